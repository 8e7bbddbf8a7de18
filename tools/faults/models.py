"""Faults in models: sites, plans, the walk over the blocks, checkpoints from disk to disk, other bases."""

from __future__ import annotations

from faults.fault import Fault

SELECTION = "compression/test_selection.py"
STREAMLINE = "methods/test_streamline.py"
RESIDUAL = "reparameterise/test_residual_rotation.py"
REWRITTEN = "reparameterise/test_reparameterise.py"

FAULTS = (
    Fault("hf/contents.py", "        install(model, name, operator)\n", "        pass\n", "hf/test_hf.py"),
    Fault("hf/contents.py", 'if operators[name].get("bias") and', "if False and", "hf/test_hf.py"),
    Fault("hf/contents.py", 'record(block, "hidden_states", 0)', "pass", "hf/test_hf.py"),
    Fault("models/loading.py", "        _keep_wide(model, wanted)\n", "", "storage/test_assembly.py"),
    Fault("sites/twin.py", "        model.initialize_weights()\n", "        pass\n", "compression/test_stream.py"),
    Fault(
        "models/loading.py",
        'if missing := sorted(report["missing_keys"]):',
        "if missing := []:",
        "models/test_loading.py",
    ),
    Fault("models/loading.py", "value.clone())", "value)", "models/test_source.py"),
    Fault("models/loading.py", "model.get_parameter(other))", "model.get_parameter(name))", "storage/test_formats.py"),
    Fault("models/source.py", "!= self.fingerprint", "!= ModelSource(self.asked).fingerprint", "models/test_source.py"),
    Fault("models/source.py", "if self.file is None else self.weights.files", "", "models/test_source.py"),
    Fault("plan.py", "if site.name not in chosen and not taken:", "if not taken:", "test_plan.py"),
    Fault(
        "plan.py", "range(num_blocks - count, num_blocks)", "range(num_blocks - count - 1, num_blocks)", "test_plan.py"
    ),
    Fault("reparameterise/heads.py", "turns = num_kv_heads if", "turns = 1 if", REWRITTEN),
    Fault("reparameterise/heads.py", "g * attention.group + alike", "g + alike", REWRITTEN),
    Fault("reparameterise/pairs.py", "torch.linalg.inv(one).T", "one", REWRITTEN),
    Fault("sites/families.py", '{"ln_1": ("attn.", "mlp.")}', '{"ln_1": ("attn.",)}', RESIDUAL),
    Fault("sites/families.py", ".view(2, -1).T", ".view(-1, 2)", REWRITTEN),
    Fault("reparameterise/pairs.py", "[-sin, cos]", "[sin, -cos]", REWRITTEN),
    Fault("reparameterise/residual.py", "norm.gain.fill_(1)", "pass", RESIDUAL),
    Fault("reparameterise/residual.py", "shift / gain) @ basis", "shift) @ basis", RESIDUAL),
    Fault("reparameterise/residual.py", "(embedding, *positions)", "(embedding,)", RESIDUAL),
    Fault("reparameterise/residual.py", "    model.config.tie_word_embeddings = False\n", "", RESIDUAL),
    Fault("reparameterise/residual.py", "if norm.block in wanted:", "if True:", RESIDUAL),
    Fault("reparameterise/residual.py", "* gain.to(basis) @ basis", "@ basis", "compression/test_slicing.py"),
    Fault("reparameterise/values.py", "values.clamp_min(FLOOR * largest)", "values.clamp_min(0)", REWRITTEN),
    Fault("reparameterise/values.py", "scale = values.flip(0) ** 0.25", "scale = values.flip(0) ** 0.5", REWRITTEN),
    Fault("sites/calls.py", "Bypass(returns=returns)", "Bypass()", "compression/test_walk.py"),
    Fault("sites/through.py", "apart(calls) if number else calls", "calls", "sites/test_seen.py"),
    Fault("sites/seen.py", "return self.by_hand | self.idle", "return set()", "sites/test_seen.py"),
    Fault("sites/calls.py", "        file.unlink()\n", "", "compression/test_stream.py"),
    Fault("sites/calls.py", "return known if same else new", "return known", "compression/test_walk.py"),
    Fault("sites/calls.py", "return known if same else new", "return new", "compression/test_walk.py"),
    Fault("sites/calls.py", 'getattr(model, "base_model", model)', "model", "compression/test_walk.py"),
    Fault("sites/calls.py", "if self.folder is None:", "if True:", "compression/test_stream_memory.py"),
    Fault("sites/installing.py", "operator.bias = bias\n", "pass\n", "sites/test_sites.py"),
    Fault("sites/installing.py", "operator.bias.add_(bias.to(operator.bias))", "pass", "sites/test_sites.py"),
    Fault("sites/installing.py", 'if hasattr(cache, "update") and', "if False and", "hf/test_hf.py"),
    Fault("sites/sites.py", "weight.t() if is_conv1d(self.module) else weight", "weight", "sites/test_sites.py"),
    Fault("sites/costs.py", "inside.update(module.modules())", "pass", "test_profile.py"),
    Fault("sites/sliced.py", "loaded.config.tie_word_embeddings = False", "pass", "compression/test_slicing.py"),
    Fault(
        "storage/assembly.py",
        "                if shape not in (None, expected):",
        "                if False:",
        "storage/test_assembly.py",
    ),
    Fault(
        "storage/assembly.py",
        "                if holds_codes(entry):",
        "                if False:",
        "models/test_codes.py",
    ),
    Fault("storage/gguf/layouts.py", "return tensor - 1", "return tensor", "storage/test_gguf.py"),
    Fault("storage/gguf/layouts.py", "pairs.swapaxes(1, 2)", "pairs", "storage/test_gguf.py"),
    Fault("storage/gguf/numbers.py", 'bitorder="little"', 'bitorder="big"', "storage/test_gguf.py"),
    Fault(
        "storage/gguf/configs.py", "if prefix == self.name and rest not in known:", "if False:", "storage/test_gguf.py"
    ),
    Fault("storage/foreign.py", "_NIBBLES = (0, 4, 1, 5,", "_NIBBLES = (0, 1, 4, 5,", "storage/test_foreign.py"),
    Fault("storage/foreign.py", "+ self.above", "+ 0", "storage/test_foreign.py"),
    Fault("models/places.py", "        refuse_adapter(folder)\n", "        pass\n", "models/test_places.py"),
    Fault(
        "storage/assembly.py",
        "in making.converter.source_patterns if",
        "in sorted(making.parts)[::-1] if",
        "storage/test_assembly.py",
    ),
    Fault("storage/assembly.py", "and self.tied.get(n) not in self._made_by", "", "storage/test_assembly.py"),
    Fault(
        "storage/assembly.py",
        "expert.copy_(self._read(parts, wanted.dtype))",
        "expert.copy_(self._read(parts, wanted.dtype)); making.__dict__.setdefault('kept', []).append(expert.clone())",
        "compression/test_stream_memory.py",
    ),
    Fault(
        "storage/safetensors.py", "not 0 <= entry.start <= entry.stop <= size", "False", "storage/test_safetensors.py"
    ),
    Fault("storage/formats.py", "entry.is_plain and dtype in", "dtype in", "storage/test_formats.py"),
    Fault("storage/entries.py", "access=mmap.ACCESS_COPY", "access=mmap.ACCESS_WRITE", "storage/test_safetensors.py"),
    Fault("storage/safetensors.py", "listed.get(entry.name) != file.name", "False", "storage/test_safetensors.py"),
    Fault("storage/files.py", "        part.unlink(missing_ok=True)\n", "        pass\n", "storage/test_files.py"),
    Fault(
        "storage/journal.py",
        "except json.JSONDecodeError:  #",
        "except KeyError:  #",
        "compression/test_stream_resume.py",
    ),
    Fault(
        "storage/journal.py",
        "lines[0] != json.loads(json.dumps(request))",
        "False",
        "compression/test_stream_resume.py",
    ),
    Fault("storage/memory.py", "        trim(0)\n", "        pass\n", "compression/test_stream_memory.py"),
    Fault("compression/to_files.py", "== making.targets and not changed", "== making.targets", STREAMLINE),
    Fault("compression/to_files.py", ' or line["changed"]', "", STREAMLINE),
    Fault(
        "compression/to_files.py",
        'file_hash(folder / file) == line["sha256"]',
        "True",
        "compression/test_stream_resume.py",
    ),
    Fault(
        "compression/to_files.py",
        "            self._write(rest, {}, [])\n",
        "            pass\n",
        "compression/test_stream.py",
    ),
    Fault(
        "compression/to_files.py",
        "pieces |= {self.assembly.stored_name(name): Piece.of(tensor) for name, tensor in new.items()}",
        "pass",
        "compression/test_stream.py",
    ),
    Fault(
        "compression/from_files.py",
        "there.get(t) == wanted[t].shape and not inside(t, operators)",
        "t in there",
        "compression/test_stream.py",
    ),
    Fault(
        "compression/checkpoint.py",
        "return len(streams_of(walk.units, inputs)) *",
        "return",
        "compression/test_stream_outputs.py",
    ),
    Fault(
        "compression/checkpoint.py", "if error.errno != errno.ENOSPC:", "if True:", "compression/test_stream_outputs.py"
    ),
    Fault(
        "compression/fitting.py",
        "install(unit.model, name, operator, move_bias=unit.moves_bias)",
        "install(unit.model, name, operator)",
        "compression/test_joint.py",
    ),
    Fault(
        "compression/layers.py",
        "if not all(is_finite(tensor) for",
        "if False and all(is_finite(tensor) for",
        "compression/test_joint_errors.py",
    ),
    Fault("compression/fitting.py", "args[1] if len(args) > 1 else 0", "0", "compression/test_walk_experts.py"),
    Fault("compression/kinds.py", "of_expert[kind] = together", "pass", "compression/test_walk_experts.py"),
    Fault(
        "compression/fitting.py",
        "1 if site is None else site.experts_per_token",
        "1",
        "compression/test_walk_experts.py",
    ),
    Fault(
        "compression/fitting.py",
        "    needed.clear()\n    tidy()\n",
        "    needed.clear()\n",
        "compression/test_joint.py",
    ),
    Fault(
        "compression/kinds.py", "return operator.to(self.site.weight.dtype)", "return operator", "storage/test_bits.py"
    ),
    Fault("compression/layers.py", "if turns else 1", "if False else 1", "compression/test_joint.py"),
    Fault("compression/layers.py", "joined.bias = nn", "joined.left_out = nn", "compression/test_joint.py"),
    Fault(
        "compression/choosing.py",
        "before, after in zip(entered[-kind.size], hidden",
        "before, after in zip(entered[0], hidden",
        SELECTION,
    ),
    Fault("compression/choosing.py", "& there - taken", "& there", SELECTION),
    Fault("compression/choosing.py", "best = min(candidates", "best = max(candidates", SELECTION),
    Fault("compression/choosing.py", "found[start].angle if", "found[start].influence if", SELECTION),
    Fault("compression/slicing.py", "outputs.T @ inputs", "inputs.T @ outputs", "compression/test_slicing.py"),
    Fault(
        "compression/slicing.py",
        "write(layer.bias, outputs).to(layer.bias)",
        "layer.bias",
        "compression/test_slicing.py",
    ),
    Fault("sites/through.py", "sorted(self.hidden.keys() - self._passed):", "set():", "compression/test_walk.py"),
    Fault(
        "sites/through.py",
        "sorted(self.hidden.keys() - self._passed):",
        "list(self.hidden):",
        "compression/test_walk.py compression/test_stream.py",
    ),
    Fault("compression/streams.py", 'if stream == "dense" or not units:', "if True:", "compression/test_walk.py"),
    Fault(
        "sites/through.py",
        "hidden[number] = self._keep(states)",
        "self._keep(states)",
        "compression/test_walk.py",
    ),
    Fault(
        "sites/through.py",
        "            yield states\n            self._home.tidy()",
        "            yield states",
        "compression/test_stream_memory.py",
    ),
    Fault("compression/walk.py", 'if "dense" in streams:', "if False:", "compression/test_stream_resume.py"),
    Fault(
        "compression/streams.py",
        'if kind.stream == "walk" else',
        "if True else",
        "methods/test_svd_llm.py compression/test_stream_outputs.py",
    ),
    Fault("sites/through.py", "() if self.is_last else", "", "compression/test_walk.py"),
    Fault(
        "compression/walk.py",
        "module.training = modes[name]",
        "module.training = True",
        "compression/test_walk_rows.py",
    ),
    Fault(
        "compression/walk.py",
        "        self.check_sizes()\n",
        "",
        "compression/test_walk_errors.py",
    ),
)
