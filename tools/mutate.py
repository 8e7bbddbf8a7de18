"""Fault injection: change one line of the source, and the tests that should notice must turn red.

    python tools/mutate.py            every fault
    python tools/mutate.py mixt       the faults in files whose path contains "mixt"
    python tools/mutate.py 40:60      those faults of the table, which lies in tools/faults

Works on a copy of the repository, so the working tree is never touched. Exit code 1 when a fault is missed, when its
line no longer exists, or when the tests are red before any fault.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from faults import FAULTS
from faults.fault import Fault

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "runs")


class Fault(NamedTuple):
    file: str  # below src/tensormix
    old: str  # stands in the file exactly once
    new: str
    tests: str  # files or folders below tests, separated by spaces


CONTRACT = "operators/test_operator_contract.py"
MIXT = "operators/test_mixt.py"
KERNEL = "kernels/test_mixt_kernel.py"
SIBLINGS = "kernels/test_mixt_siblings.py"
FUSED = "test_fused_siblings.py"
MATCHING = "operators/test_mixt_matching.py"
METHOD = "methods/test_method_contract.py"
SELECTION = "test_selection.py"
SEARCH = "test_search.py"
STREAMLINE = "test_streamline.py"
FLAT = "methods/test_flat_llm.py"
NARROW = "methods/test_narrow.py"
SOLA = "methods/test_sola.py"
DOBI = "methods/test_dobi_svd.py"

PAPERS = "report/test_report_papers.py"
BATCHES = "evaluate/test_batches.py"
QUESTIONS = "evaluate/test_questions_file.py"
BROWSER = "report/test_report_browser.py"
AWARE = "methods/test_mixt_aware.py"
STRUCTURES = "methods/test_mixt_structures.py"
RESIDUAL = "test_residual_rotation.py"
REWRITTEN = "test_reparameterise.py"

FAULTS = (
    Fault("reparameterise/heads.py", "turns = num_kv_heads if", "turns = 1 if", REWRITTEN),
    Fault("reparameterise/heads.py", "g * attention.group + alike", "g + alike", REWRITTEN),
    Fault("reparameterise/pairs.py", "torch.linalg.inv(one).T", "one", REWRITTEN),
    Fault("reparameterise/pairs.py", ".view(2, -1).T", ".view(-1, 2)", REWRITTEN),
    Fault("reparameterise/pairs.py", "[-sin, cos]", "[sin, -cos]", REWRITTEN),
    Fault("reparameterise/values.py", "values.clamp_min(FLOOR * largest)", "values.clamp_min(0)", REWRITTEN),
    Fault("reparameterise/values.py", "scale = values.flip(0) ** 0.25", "scale = values.flip(0) ** 0.5", REWRITTEN),
    Fault("reparameterise/residual.py", "norm.gain.fill_(1)", "pass", RESIDUAL),
    Fault("reparameterise/residual.py", "shift / gain) @ basis", "shift) @ basis", RESIDUAL),
    Fault("reparameterise/residual.py", "(embedding, *positions)", "(embedding,)", RESIDUAL),
    Fault("reparameterise/residual.py", "    model.config.tie_word_embeddings = False\n", "", RESIDUAL),
    Fault("reparameterise/residual.py", "if norm.block in wanted:", "if True:", RESIDUAL),
    Fault("methods/mixt_normal.py", "permute(3, 0, 1, 2, 4, 5)", "permute(0, 3, 1, 2, 4, 5)", AWARE),
    Fault("methods/mixt_normal.py", "right @ matrix.T", "right @ matrix", AWARE),
    Fault("methods/mixt_normal.py", "        dense[self.op.out_features :] = 0\n", "", AWARE),
    Fault("methods/mixt_normal.py", "self.out_padded == op.out_features and", "True and", AWARE),
    Fault("methods/conjugate_gradients.py", "left_over <= torch.finfo(start.dtype).eps * error", "False", AWARE),
    Fault("methods/mixt_aware.py", "normal.image(start).neg_()", "normal.image(0 * start).neg_()", AWARE),
    Fault("operators/chain.py", "places % self.shuffle", "places // self.shuffle", CONTRACT),
    Fault(
        "operators/monarch.py", "permute(1, 2, 0, 3), full", "permute(2, 1, 0, 3), full", "operators/test_products.py"
    ),
    Fault(
        "methods/mixt_hybrid.py",
        "parts, found, error = descend(normal, weight - dense",
        "parts, found, error = descend(normal, weight",
        STRUCTURES,
    ),
    Fault("methods/mixt.py", "self.ridge * gram.diagonal().mean()", "self.ridge", AWARE),
    Fault("operators/base.py", "y + self.bias", "y", CONTRACT),
    Fault(
        "operators/base.py",
        'register_buffer("weight", torch.empty(0))',
        'register_buffer("weight", torch.empty(0), persistent=False)',
        CONTRACT,
    ),
    Fault("operators/base.py", " if p is not self.bias)", ")", CONTRACT),
    Fault("kernels/mixt/cpu.py", "beta=int(k > 0)", "beta=0", KERNEL),
    Fault("kernels/mixt/cpu.py", "beta=int(joined < K)", "beta=0", KERNEL),
    Fault("kernels/mixt/cpu.py", "joined = 2 if K > 1 and", "joined = 2 if", KERNEL),
    Fault("kernels/mixt/cpu.py", ".add_(right[..., None])", ".copy_(right[..., None])", KERNEL),
    Fault("kernels/mixt/cpu.py", ".add_(made, alpha=1 / K)", ".copy_(made)", KERNEL),
    Fault("kernels/mixt/cpu.py", "core.unflatten(0, (parts, -1))", "core.view(parts, -1, P)", KERNEL),
    Fault("kernels/mixt/cpu.py", ", rows.storage_offset() * rows.element_size())", ")", KERNEL),
    Fault("kernels/mixt/cpu.py", "torch.promote_types(x.dtype, torch.float32)", "x.dtype", KERNEL),
    Fault("kernels/mixt/cpu.py", "x.new_zeros(K, Q, P", "x.new_ones(K, Q, P", KERNEL),
    Fault("kernels/mixt/cpu.py", "min(rows.shape[0], num_blocks * block)", "rows.shape[0]", KERNEL),
    Fault("kernels/mixt/cpu.py", "if whole else CHUNK", "if True else CHUNK", KERNEL),
    Fault("kernels/mixt/op.py", "[core.t() for core in cores]", "list(cores)", CONTRACT),
    Fault("kernels/mixt/op.py", "ctx.save_for_backward(x, *cores)", "ctx.save_for_backward(x + 0, *cores)", KERNEL),
    Fault("operators/mixt.py", "[core.to(dtype) for core in cores]", "cores", KERNEL),
    Fault(
        "kernels/mixt/siblings.py", "flatten(1)[:, : target.shape[1]]", "flatten(1)[:, -target.shape[1] :]", SIBLINGS
    ),
    Fault("kernels/mixt/siblings.py", "size - part.shape[1]))", "size - part.shape[1]), value=1.0)", SIBLINGS),
    Fault("kernels/mixt/op.py", "x.new_zeros(x.shape[0], O)", "x.new_ones(x.shape[0], O)", SIBLINGS),
    Fault("kernels/mixt/op.py", "ctx.core_bonds), x, *cores)", "ctx.core_bonds), *ctx.saved_tensors)", FUSED),
    Fault("operators/siblings.py", "else core.detach().clone()", "else core.detach()", "operators/test_siblings.py"),
    Fault(
        "operators/siblings.py", "            if value is None:", "            if False:", "operators/test_siblings.py"
    ),
    Fault("inference/siblings.py", "if self.x is not x or index", "if index", FUSED),
    Fault("inference/siblings.py", "core.data = value.detach().clone()", "core.data = value.detach()", FUSED),
    Fault("inference/siblings.py", "core.data = core.data.new_empty(0)", "pass", FUSED),
    Fault("inference/siblings.py", "if _is_watched(self._sibling):", "if False:", FUSED),
    Fault("inference/siblings.py", "if together >= separate:", "if together < separate:", FUSED),
    Fault("inference/siblings.py", "if all(isinstance(sibling, Sibling) for sibling in siblings):", "if True:", FUSED),
    Fault("recover/rates.py", "StructuredLinear | ExpertStack | Siblings", "StructuredLinear | ExpertStack", FUSED),
    Fault("inference/faster.py", "setattr(parent, child, operator)", "pass", "test_faster.py"),
    Fault("inference/faster.py", "dense.bias = operator.bias", "dense.bias = None", "test_faster.py"),
    Fault(
        "recover/finetune.py", '_checkpointing(model, "enable")({"use_reentrant": False})', "pass", "test_recover.py"
    ),
    Fault("operators/mixt.py", "(core / self.num_branches)", "(core.detach() / self.num_branches)", CONTRACT),
    Fault("operators/mixt.py", "* self.bond ** (self.num_branches - 1)\n\n\n", "\n\n\n", CONTRACT),
    Fault(
        "operators/mixt.py", "unit = bond ** (2 * (num_branches - 1))", "unit = bond ** (num_branches - 1)", MATCHING
    ),
    Fault("operators/mixt.py", "return shorter // 2 + 1", "return shorter // 2 + 2", MIXT),
    Fault("methods/soft_truncation.py", "* (mask[:, None] - mask[None, :]) * inverse", "* inverse", DOBI),
    Fault("methods/soft_truncation.py", "places = torch.arange", "places = 1 + torch.arange", DOBI),
    Fault("methods/soft_truncation.py", "(across * mask) @ vh + ", "", DOBI),
    Fault("methods/soft_truncation.py", "(1 - q) * TERMS > 1, ", "(1 - q) > 0, ", DOBI),
    Fault("methods/dobi_svd.py", "max(in_features, out_features) + 32 if", "max(in_features, out_features) if", DOBI),
    Fault("operators/remapped.py", "(q @ u * s.sqrt()).T", "(q @ u * s).T", "operators/test_remapped.py"),
    Fault(
        "operators/remapped.py",
        'bits=8, group="channel", symmetric=True)\n        self.s',
        'bits=8, group="tensor", symmetric=True)\n        self.s',
        "operators/test_remapped.py",
    ),
    Fault("budget/learned.py", " - kept.grad.sum()", "", "test_learned.py"),
    Fault("budget/learned.py", "kept.copy_(bounds.within(kept))", "pass", "test_learned.py"),
    Fault("methods/streamline.py", "root.square().sum(0).square()", "root.square().sum(0)", STREAMLINE),
    Fault("methods/streamline.py", "if error < lowest:", "if True:", STREAMLINE),
    Fault("methods/streamline.py", "torch.cat([left, -left], dim=1)", "torch.cat([left, left], dim=1)", STREAMLINE),
    Fault("streaming/disk.py", "== making.targets and not changed", "== making.targets", STREAMLINE),
    Fault("streaming/disk.py", ' or line["changed"]', "", STREAMLINE),
    Fault("operators/mixt.py", "return max(1, exponent)", "return max(1, exponent // 2 + 1)", MIXT),
    Fault("operators/mixt_matching.py", "dim1=1, dim2=3)", "dim1=1, dim2=3).flip(-1)", MATCHING),
    Fault("operators/mixt_matching.py", "        view -= part[..., None, None]\n", "", MATCHING),
    Fault("operators/mixt_matching.py", "parts.mul_(len(windows))", "parts", MATCHING),
    Fault(
        "operators/mixt_matching.py",
        "_sweep(buffer, windows) if padded == shape else",
        "_sweep(buffer, windows) if 1 else",
        MATCHING,
    ),
    Fault("operators/mixt_matching.py", "    buffer[:, shape[1] :] = 0\n", "", MATCHING),
    Fault(
        "operators/mixt_matching.py",
        "direction.mul_((size / previous) ** 2).add_(gradient)",
        "direction.copy_(gradient)",
        MATCHING,
    ),
    Fault(
        "operators/mixt_matching.py",
        "buffer = torch.zeros(padded, dtype=computing_dtype(weight)",
        "buffer = torch.zeros(padded, dtype=weight.dtype",
        MATCHING,
    ),
    Fault("operators/low_rank.py", "self.rank}", "self.rank - 1}", CONTRACT),
    Fault("operators/padded.py", "[..., : self.out_features]", "[..., 1 : self.out_features + 1]", CONTRACT),
    Fault("operators/sum.py", "for term in others:", "for term in others[1:]:", CONTRACT),
    Fault("operators/bypass.py", '(out, None) if self.returns == "tuple" else', "", "operators/test_bypass.py"),
    Fault("operators/placed.py", "return F.pad(y, (0, ", "return F.pad(y, (1, ", CONTRACT),
    Fault("operators/placed.py", "[..., :kept].flatten(-2)", "[..., -kept:].flatten(-2)", CONTRACT),
    Fault("operators/concat.py", "y = y + part.multiply(piece)", "y = part.multiply(piece)", CONTRACT),
    Fault("operators/concat.py", "matrix.chunk(self.groups)", "matrix.chunk(1)", CONTRACT),
    Fault("operators/per_head.py", '"...hr,hcr->...hc"', '"...hr,gcr->...hc"', CONTRACT),
    Fault("methods/narrow.py", "weight[chosen], grams[role]", "weight[: len(chosen)], grams[role]", NARROW),
    Fault("methods/narrow.py", "eigenvectors[..., -rank:]", "eigenvectors[..., :rank]", NARROW),
    Fault("methods/narrow.py", "root.mT @ made_of @ root", "root.mT @ root", NARROW),
    Fault("methods/narrow.py", "refit_left(wide, left, every, root)", "left", NARROW),
    Fault("methods/narrow.py", "energy = wide.square().sum(0) * ", "energy = wide.square().sum(0) + 0 * ", NARROW),
    Fault(
        "methods/narrow.py", "refitted(weight, gram, torch.arange(P, device=weight.device))", "weight[:, :P]", NARROW
    ),
    Fault("methods/narrow.py", "self.keep / width * count", "self.keep * count", NARROW),
    Fault("methods/flat_llm.py", ".eigenvectors[..., -rank:]", ".eigenvectors[..., :rank]", FLAT),
    Fault("methods/flat_llm.py", "(G, H // G)).sum(1)", "(G, H // G))[:, 0]", FLAT),
    Fault("methods/flat_llm.py", "values / (values + damping)", "values", FLAT),
    Fault("methods/whitening.py", "refit_left(wide, wide[:, chosen], pick, root)", "wide[:, chosen]", FLAT),
    Fault(
        "methods/flat_llm.py",
        "wide.mT @ v.bias.to(wide).view(G, C, 1)",
        "v.bias.to(wide).view(G, C, 1)[:, :kept]",
        FLAT,
    ),
    Fault("methods/flat_llm.py", "bias[chosen], bias.new_zeros", "bias[: len(chosen)], bias.new_zeros", FLAT),
    Fault("methods/sola.py", "None if layer.bias is None else layer.bias[order]", "layer.bias", SOLA),
    Fault("methods/sola.py", "if error < least:", "if best is not None:", SOLA),
    Fault("methods/sola.py", "product((True, False), repeat", "product((False,), repeat", SOLA),
    Fault("methods/sola.py", "magnitudes.topk(num_prime)", "(-magnitudes).topk(num_prime)", SOLA),
    Fault("operators/sliced.py", "keepdim=True) / self.full", "keepdim=True) / x.shape[-1]", "test_slicing.py"),
    Fault("walk/slicing.py", "outputs.T @ inputs", "inputs.T @ outputs", "test_slicing.py"),
    Fault("reparameterise/residual.py", "* gain.to(basis) @ basis", "@ basis", "test_slicing.py"),
    Fault("walk/slicing.py", "write(layer.bias, outputs).to(layer.bias)", "layer.bias", "test_slicing.py"),
    Fault("sites/sliced.py", "loaded.config.tie_word_embeddings = False", "pass", "test_slicing.py"),
    Fault("methods/slice_gpt.py", "[:, -width:].flip(1)", "[:, :width].flip(1)", "test_slicing.py"),
    Fault("walk/joint.py", "if turns else 1", "if False else 1", "test_joint.py"),
    Fault("walk/joint.py", "joined.bias = nn", "joined.left_out = nn", "test_joint.py"),
    Fault(
        "walk/fitting.py",
        "install(model, site.name, operator, move_bias=False)",
        "install(model, site.name, operator)",
        "test_joint.py",
    ),
    Fault(
        "walk/fitting.py", "if not all(is_finite(tensor) for", "if False and all(is_finite(tensor) for", "test_joint.py"
    ),
    Fault("statistics.py", "self._held += tokens.sum(0)", "self._held = tokens.sum(0)", "test_statistics_contract.py"),
    Fault("statistics.py", "self.num_tokens += tokens.shape[0]", "self.num_tokens += 1", "test_statistics_contract.py"),
    Fault("methods/mixt.py", "str((seed, tuple(weight.shape)))", "str(seed)", "methods/test_mixt_method.py"),
    Fault("methods/mixt.py", "    digest.update(content.data)\n", "", "methods/test_mixt_method.py"),
    Fault("methods/mixt.py", "(indices < size).sum(1)", "indices.ge(0).sum(1)", "methods/test_mixt_method.py"),
    Fault("methods/ranks.py", "floor(keep / per_rank + 1e-9)", "floor(keep / per_rank)", "methods/test_svd.py"),
    Fault(
        "methods/null.py",
        "wide @ stats[InputMean].mean.to(wide)",
        "wide @ stats[InputMean].sum.to(wide)",
        "methods/test_null.py",
    ),
    Fault("methods/base.py", 'extra="forbid", ', "", METHOD),
    Fault("sites/installing.py", "operator.bias = bias\n", "pass\n", "test_sites.py"),
    Fault("sites/installing.py", "operator.bias.add_(bias.to(operator.bias))", "pass", "test_sites.py"),
    Fault("sites/sites.py", "weight.t() if is_conv1d(self.module) else weight", "weight", "test_sites.py"),
    Fault("sites/installing.py", 'if hasattr(cache, "update"):', "if False:", "test_hf.py"),
    Fault("sites/sites.py", '"GPTJBlock", ', "", "test_sites.py"),
    Fault("plan.py", "if site.name not in chosen and not taken:", "if not taken:", "test_plan.py"),
    Fault(
        "plan.py", "range(num_blocks - count, num_blocks)", "range(num_blocks - count - 1, num_blocks)", "test_plan.py"
    ),
    Fault("walk/streams.py", "self.hidden.keys() - self._passed:", "set():", "test_walk.py"),
    Fault("walk/streams.py", "self.hidden.keys() - self._passed:", "list(self.hidden):", "test_walk.py test_stream.py"),
    Fault("walk/streams.py", 'if stream == "dense" or not here:', "if True:", "test_walk.py"),
    Fault("walk/streams.py", "self.hidden[stream][number] =", "self.hidden[stream] += []; _ =", "test_walk.py"),
    Fault(
        "walk/streams.py",
        "            yield call.run(block, entering)\n            self.tidy()",
        "            yield call.run(block, entering)",
        "test_stream_memory.py",
    ),
    Fault("walk/walk.py", "if index < self.last_observed:", "if True:", "test_walk.py"),
    Fault("walk/walk.py", "module.training = modes[name]", "module.training = True", "test_walk.py"),
    Fault("walk/walk.py", "        _check_sizes(model, self.sites, chosen)\n", "", "test_walk_errors.py"),
    Fault("walk/streams.py", 'return "dense" in self.asked', "return False", "test_stream_resume.py"),
    Fault("walk/streams.py", 'if kind.stream == "walk" else', "if True else", "methods/test_svd_llm.py test_stream.py"),
    Fault("sites/calls.py", "(hidden_states, None) if returns_tuple", "hidden_states if returns_tuple", "test_walk.py"),
    Fault("sites/calls.py", "        file.unlink()\n", "", "test_stream.py"),
    Fault("sites/calls.py", "return known if same else new", "return known", "test_walk.py"),
    Fault("sites/calls.py", "return known if same else new", "return new", "test_walk.py"),
    Fault("sites/calls.py", 'getattr(model, "base_model", model)', "model", "test_walk.py"),
    Fault("sites/calls.py", "if self.folder is None:", "if True:", "test_stream_memory.py"),
    Fault("streaming/stream.py", "return len(streams_of(walk.chosen, inputs)) *", "return", "test_stream_resume.py"),
    Fault("methods/whitening.py", "max(2 * noise, ", "max(0, ", "methods/test_svd_llm.py"),
    Fault("methods/whitening.py", "if failed else (factor", "if False else (factor", "methods/test_svd_llm.py"),
    Fault("methods/whitening.py", ".mean() + rounding)", ".mean())", "methods/test_svd_llm.py"),
    Fault(
        "methods/whitening.py",
        "torch.linalg.pinv(seen, atol=unsure)",
        "torch.linalg.pinv(seen)",
        "methods/test_svd_llm.py",
    ),
    Fault("walk/fitting.py", "args[1] if len(args) > 1 else 0", "0", "test_walk_experts.py"),
    Fault("walk/fitting.py", "of_expert[kind] = together", "pass", "test_walk_experts.py"),
    Fault("walk/fitting.py", "* site.experts_per_token", "", "test_walk_experts.py"),
    Fault("storage/checkpoint.py", "not 0 <= entry.start <= entry.stop <= size", "False", "test_checkpoint.py"),
    Fault("storage/checkpoint.py", "access=mmap.ACCESS_COPY", "access=mmap.ACCESS_WRITE", "test_checkpoint.py"),
    Fault("storage/checkpoint.py", "listed.get(entry.name) != file.name", "False", "test_checkpoint.py"),
    Fault(
        "storage/assembly.py", "            if entry.shape != expected:", "            if False:", "test_assembly.py"
    ),
    Fault(
        "storage/assembly.py",
        "in making.converter.source_patterns if",
        "in sorted(making.parts)[::-1] if",
        "test_assembly.py",
    ),
    Fault("storage/assembly.py", "and self.tied.get(n) not in self._made_by", "", "test_assembly.py"),
    Fault("storage/journal.py", "except json.JSONDecodeError:  #", "except KeyError:  #", "test_stream_resume.py"),
    Fault("storage/journal.py", "lines[0] != json.loads(json.dumps(request))", "False", "test_stream_resume.py"),
    Fault("streaming/disk.py", 'file_hash(folder / file) == line["sha256"]', "True", "test_stream_resume.py"),
    Fault("streaming/disk.py", "            self._write(rest, {}, [])\n", "            pass\n", "test_stream.py"),
    Fault(
        "streaming/source.py",
        "there.get(t) == wanted[t].shape and not inside(t, operators)",
        "t in there",
        "test_stream.py",
    ),
    Fault(
        "streaming/disk.py",
        "pieces |= {name: Piece.of(tensor) for name, tensor in new.items()}",
        "pass",
        "test_stream.py",
    ),
    Fault("walk/fitting.py", "        tidy()\n", "", "test_stream_memory.py"),
    Fault(
        "storage/assembly.py",
        "expert.copy_(self._read(parts, wanted.dtype))",
        "expert.copy_(self._read(parts, wanted.dtype)); making.__dict__.setdefault('kept', []).append(expert.clone())",
        "test_stream_memory.py",
    ),
    Fault("streaming/stream.py", "if error.errno != errno.ENOSPC:", "if True:", "test_stream_resume.py"),
    Fault("storage/memory.py", "        trim(0)\n", "        pass\n", "test_stream_memory.py"),
    Fault("models.py", "        _keep_wide(model, wanted)\n", "", "test_assembly.py"),
    Fault("models.py", "        model.initialize_weights()\n", "        pass\n", "test_stream.py"),
    Fault("hf/plugin.py", "        install(model, name, operator)\n", "        pass\n", "test_hf.py"),
    Fault("hf/plugin.py", 'if entry.get("bias") and', "if False and", "test_hf.py"),
    Fault("hf/plugin.py", 'record(block, "hidden_states", 0)', "pass", "test_hf.py"),
    Fault("models.py", 'if missing := sorted(report["missing_keys"]):', "if missing := []:", "test_models.py"),
    Fault("recipe/recipe.py", "placed[key] = placed_path(placed[key], folder)", "pass", "test_recipe.py"),
    Fault("recipe/reading.py", "(folder / model).exists()", "False", "test_recipe.py"),
    Fault(
        "evaluate/perplexity.py", "        scored = end\n", "        scored = begin\n", "evaluate/test_perplexity.py"
    ),
    Fault(
        "evaluate/forward.py",
        "last = [len(row) - 1 for row in rows]",
        "last = [longest - 1 for row in rows]",
        "evaluate/test_choices.py",
    ),
    Fault("evaluate/choices.py", "own = copy.deepcopy(cache)", "own = cache", "evaluate/test_choices.py"),
    Fault("diagnose/geometry.py", "(own - dense).abs()", "(own - dense)", "diagnose/test_geometry.py"),
    Fault("diagnose/entropy.py", "if value > 0)", "if value > 0.2)", "diagnose/test_entropy.py"),
    Fault(
        "diagnose/boundary.py",
        "stays = below[:, place - 1, place:].all(axis=1)",
        "stays = below[:, place - 1, place]",
        "diagnose/test_boundary.py",
    ),
    Fault("data.py", "(IGNORED)\n            ids += new", "(0)\n            ids += new[1:]", "test_data.py"),
    Fault("data.py", 'text.removeprefix(self.tokenizer.bos_token or "")', "text", "test_data.py"),
    Fault("data.py", "epoch, place = divmod(", "place, epoch = divmod(", "test_data.py"),
    Fault(
        "exam/families.py",
        "num_smaller = min(random.randrange(4), len(smaller))",
        "num_smaller = min(1, len(smaller))",
        "exam",
    ),
    Fault("exam/questions.py", "gold = random.randrange(4)", "gold = random.randrange(3)", "exam"),
    Fault("storage/files.py", "        part.unlink(missing_ok=True)\n", "        pass\n", "test_files.py"),
    Fault("sites/sites.py", "inside.update(module.modules())", "pass", "test_profile.py"),
    Fault("profile.py", "self.live -= size", "pass", "test_profile.py"),
    Fault("recover/watch.py", "== _sizes(checkpoint)", "is not None", "test_recover.py"),
    Fault("recover/finetune.py", "parameter.requires_grad_(parameter in trained)", "pass", "test_recover.py"),
    Fault("recover/lora.py", "patch.left.zero_()", "patch.left.fill_(1e-3)", "test_lora.py"),
    Fault("recover/lora.py", '"lr": learning_rate * self.settings.scale', '"lr": learning_rate', "test_lora.py"),
    Fault("recover/lora.py", "right.requires_grad_(not first)", "right.requires_grad_(True)", "test_lora.py"),
    Fault("recover/lora.py", "factor.add_(patch.to_dense())", "pass", "test_lora.py"),
    Fault("recover/lora.py", "        attach(model)  # checkpoints", "        # checkpoints", "test_lora.py"),
    Fault("recover/lora.py", "new.bias, old.bias = old.bias, None", "pass", "test_lora.py"),
    Fault("recover/losses.py", " - tail * others", "", "test_losses.py"),
    Fault("recover/losses.py", "+ total[..., None])", ")", "test_losses.py"),
    Fault("recover/teacher.py", "return len(there) >= len(ids)", "return True", "test_teacher.py"),
    Fault("recover/trainer.py", "self.logits[self.first + index]", "self.logits[index]", "test_teacher.py"),
    Fault(
        "recover/local.py",
        "hidden[inputs], targets, hidden",
        "hidden[inputs], hidden[inputs], hidden",
        "test_distill.py",
    ),
    Fault("recover/rates.py", "operator.in_features / parameter.shape[-1]", "1.0", "test_distill.py"),
    Fault("recover/watch.py", 'row["loss"] > lowest + self.diverged', "False", "test_recover.py"),
    Fault("run/sweep.py", "and c.depth < cell.depth]", "]", "test_sweep_search.py"),
    Fault("run/sweep.py", "bisect_boundary(measure, self.num_blocks)", "measure(0)", "test_sweep_search.py"),
    Fault("diagnose/verdict.py", "step > self.num_steps / 2", "True", "test_sweep_search.py"),
    Fault(
        "run/stages.py",
        "is_turned else recipe.start or recipe.model",
        "is_turned else recipe.model",
        "test_sweep_search.py",
    ),
    Fault("run/predict.py", "(after - before, depth)", "(before - after, depth)", "test_predict.py"),
    Fault("run/predict.py", "if depth is not None and signal not in WITHOUT_A_SAY", "if depth", "test_predict.py"),
    Fault("run/predict.py", "states - states.mean(0)", "states", "test_predict.py"),
    Fault("run/predict.py", "/ self.rank).log().abs()", "/ self.rank)", "test_predict.py"),
    Fault("evaluate/questions_file.py", "len(prompts) < num_questions:\n            p", "1:\n            p", QUESTIONS),
    Fault("evaluate/questions_file.py", "isinstance(gold, bool) or ", "", QUESTIONS),
    Fault("evaluate/questions_file.py", '.split("\\n"), 1)', '.split("\\n"))', QUESTIONS),
    Fault("run/predict.py", "total += errors.get(block, 0.0)", "total += 1", "test_predict.py"),
    Fault("run/keys.py", '["key"] != keys[stage]', '["key"] == ""', "test_run.py"),
    Fault("run/sweep.py", 'where = f"{cell.direction} {cell.depth}"', 'where = f"last {cell.depth}"', "test_sweep.py"),
    Fault("report/page.css", "font-size: 14.8px", "font-size: 12.5px", BROWSER),
    Fault("report/page.css", "max-width: 100%; width: fit-content", "width: fit-content", BROWSER),
    Fault("report/page.js", 'event.pointerType === "mouse" && hide()', "hide()", BROWSER),
    Fault("report/page.js", "at + step + order.length", "at + order.length", BROWSER),
    Fault("report/svg.py", 'role="img" tabindex="0"', 'role="img"', BROWSER),
    Fault("report/svg.py", "at(gap + HEAD, HEAD / 2)}L{at(gap)}", "at(gap + HEAD)}L{at(0)}", PAPERS),
    Fault(
        "report/tradeoffs.py", "panel.arrow(begin, (item.bits_saved", "panel.arrow((0.0, end), (item.bits_saved", PAPERS
    ),
    Fault("run/stages.py", 'self._load(self.folder / "compressed")', "self.model", "test_run_direct.py"),
    Fault("run/keys.py", 'del settings["batch_size"], settings["direct"]', "pass", "test_run_direct.py"),
    Fault("evaluate/batches.py", "2 * self.size >= self._too_many", "False", BATCHES),
    Fault("evaluate/batches.py", "max(rates) < GAIN * max(before)", "False", BATCHES),
    Fault("evaluate/batches.py", "self.size // 2, False", "self.size, False", BATCHES),
    Fault("report/tradeoffs.py", "-0.90 + 4.87", "-0.90 + 4.78", "report/test_report_papers.py"),
    Fault("report/tradeoffs.py", "1.20 - 1.30", "1.30 - 1.20", "report/test_report_papers.py"),
    Fault("report/measures.py", "(own - embedding)", "own", "report/test_report_papers.py"),
    Fault("report/weights.py", "max(gaps, key=len", "min(gaps, key=len", "report/test_report_papers.py"),
    Fault("report/accounts.py", "dense / own if own", "own / dense if own", "report/test_report_papers.py"),
    Fault("run/family.py", "or len(done) < 2", "", "test_family.py"),
    Fault("run/family.py", 'row["model"] == "compressed"', 'row["model"] == "dense"', "test_family.py"),
    Fault("diagnose/residual.py", "((left - right)", "((left - 0.9 * right)", "diagnose/test_residual.py"),
    Fault("diagnose/residual.py", "(size / other)[both]", "(other / size)[both]", "diagnose/test_residual.py"),
    Fault("diagnose/residual.py", "return max(touched", "return min(touched", "diagnose/test_residual.py"),
    Fault("evaluate/benchmarks.py", '.split("\\n"), 1)', ".splitlines(), 1)", "evaluate/test_benchmarks.py"),
    Fault(
        "evaluate/benchmarks.py",
        "for doc in part if benchmark",
        "for doc in part if 1 or benchmark",
        "evaluate/test_benchmarks.py",
    ),
    Fault("evaluate/harness.py", "if _key(item) not in kept.found", "if 1", "evaluate/test_harness.py"),
    Fault("evaluate/harness.py", "if lines[0] == head:", "if 1:", "evaluate/test_harness.py"),
    Fault("evaluate/harness.py", "lines[1:-1]", "lines[1:]", "evaluate/test_harness.py"),
    Fault("evaluate/batches.py", "self.size, self.size // 2\n", "self.size, self.size - 1\n", BATCHES),
    Fault("evaluate/harness.py", 'row.get("shots") == 0', "1", "evaluate/test_harness.py"),
    Fault("diagnose/spectra.py", "exponent=0.0 - slope", "exponent=0.0 + slope", "diagnose/test_spectra.py"),
    Fault("diagnose/spectra.py", "values[first - 1 : last]", "values[first : last + 1]", "diagnose/test_spectra.py"),
    Fault("diagnose/spectra.py", "(wide.T @ wide)", "(wide.T @ wide).diag().diag()", "diagnose/test_spectra.py"),
    Fault("diagnose/super_weights.py", "and c.share >= self.share", "", "diagnose/test_super_weights.py"),
    Fault("diagnose/super_weights.py", "                zero(found)\n", "", "diagnose/test_super_weights.py"),
    Fault("diagnose/restoration.py", "return last_wrong + 1", "return last_wrong", "diagnose/test_restoration.py"),
    Fault("diagnose/restoration.py", "wrong.flip(1)", "wrong", "diagnose/test_restoration.py"),
    Fault(
        "diagnose/restoration.py", "(total / num_tokens).sqrt()", "(total / num_tokens)", "diagnose/test_restoration.py"
    ),
    Fault("diagnose/sensitivity.py", "        layers[index] = own\n", "        pass\n", "diagnose/test_sensitivity.py"),
    Fault("diagnose/base.py", "num_tokens += ids[:, 1:]", "num_tokens += ids", "diagnose/test_sensitivity.py"),
    Fault(
        "diagnose/spectral_gap.py", "tail = values[rank:]", "tail = values[rank - 1 :]", "diagnose/test_spectral_gap.py"
    ),
    Fault("diagnose/spectral_gap.py", "ord=2", 'ord="fro"', "diagnose/test_spectral_gap.py"),
    Fault("diagnose/scaling.py", "slope * unit**exponent", "slope", "diagnose/test_scaling.py"),
    Fault(
        "walk/selection.py",
        "before, after in zip(entered[-kind.size], hidden",
        "before, after in zip(entered[0], hidden",
        SELECTION,
    ),
    Fault("budget/search.py", "exam_prompts(together)[num_judging:]", "exam_prompts(together)[:num_choosing]", SEARCH),
    Fault("budget/search.py", "ids[num_judging : num_judging + num_choosing]", "ids[:num_choosing]", SEARCH),
    Fault("budget/search.py", "copy.deepcopy(fitted[pair])", "fitted[pair]", SEARCH),
    Fault("budget/search.py", "    if needed > least:", "    if False:", SEARCH),
    Fault("budget/search.py", "log_softmax(0)[r", "softmax(0)[r", SEARCH),
    Fault("budget/search.py", "min(math.floor(len(ids) * (1 - part)), len(ids) - text.window)", "len(ids)", SEARCH),
    Fault("run/keys.py", '"budget": None, "search": None}', '"budget": None}', SEARCH),
    Fault("walk/selection.py", "& there - taken", "& there", SELECTION),
    Fault("walk/selection.py", "best = min(candidates", "best = max(candidates", SELECTION),
    Fault("walk/selection.py", "found[start].angle if", "found[start].influence if", SELECTION),
    Fault("methods/block_distances.py", "state[:, -1:]", "state[:, :1]", SELECTION),
    Fault("methods/block_distances.py", "chord.square() / 2", "chord / 2", SELECTION),
    Fault("budget/survey.py", "rest[min(rank, len(squares))]", "rest[min(rank + 1, len(squares))]", "test_budget.py"),
    Fault("budget/survey.py", "/ probed.error, LEAST)", ", LEAST)", "test_budget.py"),
    Fault("budget/survey.py", "setattr(holder, child, old)", "pass", "test_budget.py"),
    Fault("budget/budget.py", "* whole) - outside", "* whole)", "test_budget.py"),
    Fault(
        "budget/budget.py",
        "return self.files.dense_bits(self.sites[site.name])",
        "return super().dense_bits(site)",
        "test_budget.py",
    ),
    Fault("walk/fitting.py", "out_features).to(site.weight.dtype)", "out_features)", "test_bits.py"),
    Fault("budget/sensitivity.py", "means[site.block or 0]", "means[0]", "test_budget.py"),
    Fault(
        "evaluate/divergence.py", "p * (log_p - log_q), 0)", "p * (log_p - log_q), p)", "evaluate/test_divergence.py"
    ),
    Fault("evaluate/divergence.py", "total / num_tokens", "total / len(token_ids)", "evaluate/test_divergence.py"),
    Fault("run/compare.py", "impossible[cell.name] = str(reason)", "pass", "test_compare.py"),
    Fault("report/pareto.py", "if value < lowest:", "if value <= lowest:", "report/test_report_pareto.py"),
    Fault("report/pareto.py", "min(known), max(known)", "max(known), max(known)", "report/test_report_pareto.py"),
)


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    first, colon, last = wanted.partition(":")
    if colon:
        faults = list(FAULTS[int(first or 0) : int(last or len(FAULTS))])
    else:
        faults = [fault for fault in FAULTS if wanted in fault.file]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        for tests in sorted({fault.tests for fault in faults}):
            if (found := first_failure(copy, tests)) is not None:
                print(f"red before any fault: {tests}: {found}")
                return 1
        missed = sum(not caught(copy, fault) for fault in faults)
    print(f"{len(faults) - missed} of {len(faults)} faults caught")
    return 1 if missed or not faults else 0


def caught(copy: Path, fault: Fault) -> bool:
    """Whether the named tests notice the fault; prints one line."""
    path = copy / "src/tensormix" / fault.file
    source = path.read_text()
    change = f"{fault.file}: {fault.old.strip()!r} -> {fault.new.strip()!r}"
    if source.count(fault.old) != 1:
        print(f"STALE   {change} (the line stands there {source.count(fault.old)} times)", flush=True)
        return False
    path.write_text(source.replace(fault.old, fault.new))
    try:
        found = first_failure(copy, fault.tests)
    finally:
        path.write_text(source)
    print(f"{'MISSED' if found is None else 'caught'}  {change} | {found}", flush=True)
    return found is not None


def first_failure(copy: Path, tests: str) -> str | None:
    """The first red line of these tests, or None when all are green."""
    # no .pyc: two faults of one file may have the same size and second, and the stale one would run
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in tests.split()]
    run = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    lines = run.stdout.splitlines()
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), (lines or [run.stderr.strip()])[-1])


if __name__ == "__main__":
    sys.exit(main())
