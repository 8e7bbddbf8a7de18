"""Faults in operators and the kernels that multiply them."""

from __future__ import annotations

from faults.fault import Fault

CONTRACT = "operators/test_operator_contract.py"
MIXT = "operators/test_mixt.py"
KERNEL = "kernels/test_mixt_kernel.py"
SIBLINGS = "kernels/test_mixt_siblings.py"
FUSED = "inference/test_fused_siblings.py inference/test_inside_fused_siblings.py"
ZEROS = "inference/test_without_zeros.py"
MATCHING = "operators/test_mixt_matching.py"

FAULTS = (
    Fault("inference/faster.py", "setattr(parent, child, operator)", "pass", "inference/test_faster.py"),
    Fault("inference/faster.py", "dense.bias = bias = operator.bias", "bias = None", "inference/test_faster.py"),
    Fault("operators/shared_calls.py", "if self.x is not x or part", "if part", FUSED),
    Fault("inference/siblings.py", "core.data = value.detach().clone()", "core.data = value.detach()", FUSED),
    Fault("inference/siblings.py", "core.data = core.data.new_empty(0)", "pass", FUSED),
    Fault("operators/shared_calls.py", "if is_watched(self._view):", "if False:", FUSED),
    Fault("inference/siblings.py", "if together >= separate:", "if together < separate:", FUSED),
    Fault("operators/shared_calls.py", "if owners[0] is not None and all(", "if True or all(", FUSED),
    Fault("operators/shared.py", "around, **{name: part", "{}, **{name: part", "operators/test_shared.py"),
    Fault("operators/shared.py", 'vars(self)["owner"] = owner', "self.owner = owner", "operators/test_shared.py"),
    Fault("operators/shared.py", "if owner.together and len(found) > 1:", "if False:", FUSED),
    Fault(
        "operators/siblings.py", '"names": list(self.kinds)', '"names": sorted(self.kinds)', "operators/test_shared.py"
    ),
    Fault("sites/installing.py", "common.pop()", "break", "hf/test_hf_shared.py"),
    Fault("sites/installing.py", "view.owner_name = name", "pass", "hf/test_hf_shared.py"),
    Fault("sites/locate.py", " and not n.startswith(inner)", "", "hf/test_hf_shared.py"),
    Fault(
        "operators/experts.py",
        "whole.bytes_per_token // self.num_experts",
        "whole.bytes_per_token",
        "sites/test_costs.py",
    ),
    Fault("inference/zeros.py", "self.bias[: self.out_features]", "self.bias[-self.out_features :]", ZEROS),
    Fault("inference/zeros.py", "setattr(parent, name, layer.train(kept.training))", "pass", ZEROS),
    Fault("inference/zeros.py", ' or "forward" in vars(layer)', "", ZEROS),
    Fault("inference/zeros.py", "layer.bias = kept.bias", "pass", ZEROS),
    Fault("inference/faster.py", "bias.detach()[: operator.out_features]", "bias.detach()[-1:]", ZEROS),
    Fault("inference/zeros.py", "return self._spec", "return super().spec", ZEROS),
    Fault("inference/zeros.py", "if len(kept) > 1:", "if False:", ZEROS),
    Fault("inference/zeros.py", "in_groups=1 if reads else layer.in_groups", "in_groups=layer.out_groups", ZEROS),
    Fault("kernels/mixt/cpu.py", "beta=int(k > 0)", "beta=0", KERNEL),
    Fault("kernels/mixt/cpu.py", "beta=int(joined < K)", "beta=0", KERNEL),
    Fault("kernels/mixt/cpu.py", "joined = 2 if K > 1 and", "joined = 2 if", KERNEL),
    Fault("kernels/mixt/cpu.py", ".add_(right[..., None])", ".copy_(right[..., None])", KERNEL),
    Fault("kernels/mixt/cpu.py", ".add_(made, alpha=1 / K)", ".copy_(made)", KERNEL),
    Fault("kernels/mixt/cpu.py", ", rows.storage_offset() * rows.element_size())", ")", KERNEL),
    Fault("kernels/mixt/cpu.py", "torch.promote_types(x.dtype, torch.float32)", "x.dtype", KERNEL),
    Fault("kernels/mixt/cpu.py", "x.new_zeros(K, Q, P", "x.new_ones(K, Q, P", KERNEL),
    Fault("kernels/mixt/cpu.py", "min(rows.shape[0], num_blocks * block)", "rows.shape[0]", KERNEL),
    Fault("kernels/mixt/cpu.py", "if whole else CHUNK", "if True else CHUNK", KERNEL),
    Fault("kernels/mixt/op.py", "[core.t() for core in cores]", "list(cores)", CONTRACT),
    Fault("kernels/mixt/op.py", "ctx.save_for_backward(x, *cores)", "ctx.save_for_backward(x + 0, *cores)", KERNEL),
    Fault("kernels/mixt/op.py", "ctx.core_bonds), x, *cores)", "ctx.core_bonds), *ctx.saved_tensors)", FUSED),
    Fault(
        "kernels/mixt/siblings.py", "flatten(1)[:, : target.shape[1]]", "flatten(1)[:, -target.shape[1] :]", SIBLINGS
    ),
    Fault("kernels/mixt/siblings.py", "size - part.shape[1]))", "size - part.shape[1]), value=1.0)", SIBLINGS),
    Fault("operators/base.py", "y + self.bias", "y", CONTRACT),
    Fault(
        "operators/base.py",
        'register_buffer("weight", torch.empty(0))',
        'register_buffer("weight", torch.empty(0), persistent=False)',
        CONTRACT,
    ),
    Fault("operators/base.py", 'if name != "bias")', ")", CONTRACT),
    Fault("operators/bypass.py", "out if self._beside is None else", "", "operators/test_bypass.py"),
    Fault("operators/chain.py", "places % self.shuffle", "places // self.shuffle", CONTRACT),
    Fault("operators/concat.py", "y = y + part(piece)", "y = part.multiply(piece)", CONTRACT),
    Fault("operators/concat.py", "matrix.chunk(self.groups)", "matrix.chunk(1)", CONTRACT),
    Fault("operators/low_rank.py", "self.rank}", "self.rank - 1}", CONTRACT),
    Fault("operators/mixt.py", "[core.to(dtype) for core in cores]", "cores", KERNEL),
    Fault("operators/mixt.py", "(core / self.num_branches)", "(core.detach() / self.num_branches)", CONTRACT),
    Fault("operators/mixt.py", "* self.bond ** (self.num_branches - 1)\n\n\n", "\n\n\n", CONTRACT),
    Fault(
        "operators/mixt.py", "unit = bond ** (2 * (num_branches - 1))", "unit = bond ** (num_branches - 1)", MATCHING
    ),
    Fault("operators/mixt.py", "return shorter // 2 + 1", "return shorter // 2 + 2", MIXT),
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
    Fault(
        "operators/block_tensor_train.py",
        "permute(1, 2, 0, 3), full",
        "permute(2, 1, 0, 3), full",
        "operators/test_products.py",
    ),
    Fault("operators/padded.py", "[..., : self.out_features]", "[..., 1 : self.out_features + 1]", CONTRACT),
    Fault("operators/per_head.py", '"...hr,hcr->...hc"', '"...hr,gcr->...hc"', CONTRACT),
    Fault("operators/placed.py", "return F.pad(y, (0, ", "return F.pad(y, (1, ", CONTRACT),
    Fault("operators/placed.py", "[..., :kept].flatten(-2)", "[..., -kept:].flatten(-2)", CONTRACT),
    Fault("operators/remapped.py", "(q @ u * s.sqrt()).T", "(q @ u * s).T", "operators/test_remapped.py"),
    Fault(
        "operators/remapped.py",
        'bits=8, group="channel", symmetric=True)\n        self.s',
        'bits=8, group="tensor", symmetric=True)\n        self.s',
        "operators/test_remapped.py",
    ),
    Fault(
        "operators/sliced.py", "keepdim=True) / self.full", "keepdim=True) / x.shape[-1]", "compression/test_slicing.py"
    ),
    Fault("operators/sum.py", "for term in others:", "for term in others[1:]:", CONTRACT),
)
