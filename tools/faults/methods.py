"""Faults in methods, and the statistics that they are given."""

from __future__ import annotations

from faults.fault import Fault

METHOD = "methods/test_method_contract.py"
SELECTION = "compression/test_selection.py"
STREAMLINE = "methods/test_streamline.py"
FLAT = "methods/test_flat_llm.py"
NARROW = "methods/test_narrow.py"
SOLA = "methods/test_sola.py"
DOBI = "methods/test_dobi_svd.py"
AWARE = "fitting/test_mixt_aware.py"
STRUCTURES = "methods/test_mixt_structures.py"

FAULTS = (
    Fault("methods/base.py", 'extra="forbid", ', "", METHOD),
    Fault("fitting/block_distances.py", "state[:, -1:]", "state[:, :1]", SELECTION),
    Fault("fitting/block_distances.py", "chord.square() / 2", "chord / 2", SELECTION),
    Fault("fitting/conjugate_gradients.py", "left_over <= torch.finfo(start.dtype).eps * error", "False", AWARE),
    Fault("methods/dobi_svd.py", "max(in_features, out_features) + 32 if", "max(in_features, out_features) if", DOBI),
    Fault("methods/flat_llm.py", ".eigenvectors[..., -rank:]", ".eigenvectors[..., :rank]", FLAT),
    Fault("methods/flat_llm.py", "(G, H // G)).sum(1)", "(G, H // G))[:, 0]", FLAT),
    Fault("methods/flat_llm.py", "values / (values + damping)", "values", FLAT),
    Fault("methods/mixt.py", "pairs = [(1, self.bonds[0])]", "pairs = []", "allocation/test_budget_bonds.py"),
    Fault(
        "methods/mixt.py", "for bond in self.bonds:", "for bond in self.bonds[:1]:", "allocation/test_budget_bonds.py"
    ),
    Fault("methods/mixt.py", "self.ridge * gram.diagonal().mean()", "self.ridge", AWARE),
    Fault("methods/mixt.py", "str((seed, tuple(weight.shape)))", "str(seed)", "methods/test_mixt_method.py"),
    Fault("methods/mixt.py", "    digest.update(content.data)\n", "", "methods/test_mixt_method.py"),
    Fault("methods/mixt.py", "(indices < size).sum(1)", "indices.ge(0).sum(1)", "methods/test_mixt_method.py"),
    Fault("fitting/mixt_aware.py", "normal.image(start).neg_()", "normal.image(0 * start).neg_()", AWARE),
    Fault(
        "methods/mixt_hybrid.py",
        "parts, found, error = descend(normal, weight - dense",
        "parts, found, error = descend(normal, weight",
        STRUCTURES,
    ),
    Fault("fitting/mixt_normal.py", "permute(3, 0, 1, 2, 4, 5)", "permute(0, 3, 1, 2, 4, 5)", AWARE),
    Fault("fitting/mixt_normal.py", "right @ matrix.T", "right @ matrix", AWARE),
    Fault("fitting/mixt_normal.py", "        dense[self.op.out_features :] = 0\n", "", AWARE),
    Fault("fitting/mixt_normal.py", "self.out_padded == op.out_features and", "True and", AWARE),
    Fault("methods/narrow.py", "weight[chosen], grams[role]", "weight[: len(chosen)], grams[role]", NARROW),
    Fault("methods/narrow.py", "eigenvectors[..., -rank:]", "eigenvectors[..., :rank]", NARROW),
    Fault("methods/narrow.py", "root.mT @ made_of @ root", "root.mT @ root", NARROW),
    Fault("methods/narrow.py", "refit_left(wide, left, every, root)", "left", NARROW),
    Fault("methods/narrow.py", "energy = wide.square().sum(0) * ", "energy = wide.square().sum(0) + 0 * ", NARROW),
    Fault(
        "methods/narrow.py", "refitted(weight, gram, torch.arange(P, device=weight.device))", "weight[:, :P]", NARROW
    ),
    Fault("methods/narrow.py", "self.keep / width * count", "self.keep * count", NARROW),
    Fault("methods/neurons.py", "maps @ bias.to(maps).view(G, C, 1)", "bias.to(maps).view(G, C, 1)[:, :R]", FLAT),
    Fault("methods/neurons.py", "bias[chosen], bias.new_zeros", "bias[: len(chosen)], bias.new_zeros", FLAT),
    Fault("methods/neurons.py", "maps @ bias.to(maps).view(G, C, 1)", "bias.to(maps).view(G, C, 1)[:, :R]", NARROW),
    Fault("methods/neurons.py", "bias[chosen], bias.new_zeros", "bias[: len(chosen)], bias.new_zeros", NARROW),
    Fault(
        "methods/null.py",
        "wide @ stats[InputMean].mean.to(wide)",
        "wide @ stats[InputMean].sum.to(wide)",
        "methods/test_null.py",
    ),
    Fault("fitting/ranks.py", "floor(keep / per_rank + 1e-9)", "floor(keep / per_rank)", "methods/test_svd.py"),
    Fault("methods/slice_gpt.py", "[:, -width:].flip(1)", "[:, :width].flip(1)", "compression/test_slicing.py"),
    Fault("fitting/soft_truncation.py", "* (mask[:, None] - mask[None, :]) * inverse", "* inverse", DOBI),
    Fault("fitting/soft_truncation.py", "places = torch.arange", "places = 1 + torch.arange", DOBI),
    Fault("fitting/soft_truncation.py", "(across * mask) @ vh + ", "", DOBI),
    Fault("fitting/soft_truncation.py", "(1 - q) * TERMS > 1, ", "(1 - q) > 0, ", DOBI),
    Fault("methods/sola.py", "None if layer.bias is None else layer.bias[order]", "layer.bias", SOLA),
    Fault("methods/sola.py", "if error < least:", "if best is not None:", SOLA),
    Fault("methods/sola.py", "product((True, False), repeat", "product((False,), repeat", SOLA),
    Fault("methods/sola.py", "magnitudes.topk(num_prime)", "(-magnitudes).topk(num_prime)", SOLA),
    Fault("methods/streamline.py", "root.square().sum(0).square()", "root.square().sum(0)", STREAMLINE),
    Fault("methods/streamline.py", "if error < lowest:", "if True:", STREAMLINE),
    Fault("methods/streamline.py", "torch.cat([left, -left], dim=1)", "torch.cat([left, left], dim=1)", STREAMLINE),
    Fault("fitting/whitening.py", "refit_left(wide, wide[:, chosen], pick, root)", "wide[:, chosen]", FLAT),
    Fault("fitting/whitening.py", "max(2 * noise, ", "max(0, ", "methods/test_svd_llm.py"),
    Fault("fitting/whitening.py", "if failed else (factor", "if False else (factor", "methods/test_svd_llm.py"),
    Fault("fitting/whitening.py", ".mean() + rounding)", ".mean())", "methods/test_svd_llm.py"),
    Fault(
        "fitting/whitening.py",
        "torch.linalg.pinv(seen, atol=unsure)",
        "torch.linalg.pinv(seen)",
        "methods/test_svd_llm.py",
    ),
    Fault("statistics.py", "self._held += tokens.sum(0)", "self._held = tokens.sum(0)", "test_statistics_contract.py"),
    Fault("statistics.py", "self.num_tokens += tokens.shape[0]", "self.num_tokens += 1", "test_statistics_contract.py"),
)
