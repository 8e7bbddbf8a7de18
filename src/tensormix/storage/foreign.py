"""Weights that other programs stored as codes: GPTQ, AWQ, compressed-tensors, fp8 with a scale; no models, no files.

They become plain weights when they are read, and are written as such: nothing stays in those layouts.
Shape letters: O out_features, I in_features, S groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# By layout, the tensor of codes and what lies beside it: ends of names, after the name of the module.
_PARTS = {
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "awq": ("qweight", "scales", "qzeros"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "fp8 with a scale": ("weight", "weight_scale", "input_scale"),
}
_NEEDED = {"gptq": 3, "awq": 3, "compressed-tensors": 2, "fp8 with a scale": 2}
# compressed-tensors stores whole bytes under the name of the weight itself.
_WHOLE = ("weight", "weight_scale", "weight_zero_point", "input_scale", "weight_g_idx")
_READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # of an int32 of AWQ, the place of each of eight numbers


@dataclass(frozen=True)
class Foreign:
    """How a checkpoint of another program stores its weights, with the calls of `Pack`.

    Attributes:
        name: a key of `_PARTS`.
        bits: of a code of GPTQ and AWQ.
        group: inputs that share a scale, where no tensor says which; -1 for all.
        above: what GPTQ's zeros are stored below their value.
        block: rows and columns that share a scale, where they are blocks.
    """

    name: str
    bits: int = 4
    group: int = -1
    above: int = 0
    block: tuple[int, int] | None = None
    is_kept = False

    def dense_name(self, stored: str) -> str:
        """The weight that the stored tensor is a part of; its own name if it is a whole one."""
        stem, _, leaf = stored.rpartition(".")
        known = (*_PARTS[self.name], *(_WHOLE if self.name == "compressed-tensors" else ()))
        return f"{stem}.weight" if leaf in known else stored

    def companions(self, name: str, stored: Container[str]) -> dict[str, str]:
        """Role -> name of the stored tensor, for everything that makes the weight `name`; see `Pack`.

        Raises ValueError if one part is there and another is missing.
        """
        stem, _, leaf = name.rpartition(".")
        parts = _PARTS[self.name]
        if self.name == "compressed-tensors" and f"{stem}.{parts[0]}" not in stored:
            parts = _WHOLE
        if leaf != "weight" or not any(f"{stem}.{part}" in stored for part in parts if part != "weight"):
            return {"weight": name}
        for part in parts[: _NEEDED[self.name]]:
            if f"{stem}.{part}" not in stored:
                raise ValueError(f"{name} is packed, but {stem}.{part} is missing; the checkpoint is incomplete")
        return {part: f"{stem}.{part}" for part in parts if f"{stem}.{part}" in stored}

    def shape(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> tuple[int, ...]:
        """Of the weight, from those of its parts by role; `read` gives a part."""
        if "weight_shape" in shapes:
            return tuple(read("weight_shape").tolist())
        if "weight_packed" in shapes:
            raise ValueError("weight_shape is missing; the checkpoint is incomplete")
        if "qweight" not in shapes:
            return shapes["weight"]
        rows, columns = shapes["qweight"]
        return (columns, rows * 32 // self.bits) if self.name == "gptq" else (columns * 32 // self.bits, rows)

    def unpack(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, from its parts by role; what is not packed is cast.

        Raises ValueError if shapes do not fit each other, or a scale is not finite.
        """
        if len(tensors) == 1:
            weight = tensors["weight"]
            return weight.to(dtype) if weight.is_floating_point() else weight
        scale = tensors["scales"] if "scales" in tensors else tensors["weight_scale"]
        if not scale.isfinite().all():
            raise ValueError(f"{self.name}: {int((~scale.isfinite()).sum())} of {scale.numel()} scales are not finite")
        if self.name == "gptq":
            return self._gptq(tensors).to(dtype)
        if self.name == "awq":
            return self._awq(tensors).to(dtype)
        return self._scaled(tensors, scale).to(dtype)

    def _gptq(self, tensors: Mapping[str, Tensor]) -> Tensor:  # (O, I)
        codes = unpacked(tensors["qweight"].t(), self.bits)  # (O, I)
        zeros = unpacked(tensors["qzeros"], self.bits) + self.above  # (S, O)
        if (zeros >= 2**self.bits).any():
            raise ValueError("gptq: a zero is stored as one below nought, which programs read in two ways")
        groups = tensors.get("g_idx")
        if groups is None:
            groups = torch.arange(codes.shape[1]) // (self.group if self.group > 0 else codes.shape[1])
        return _grouped(codes, zeros, tensors["scales"], groups.long())

    def _awq(self, tensors: Mapping[str, Tensor]) -> Tensor:  # (O, I)
        codes = unpacked(tensors["qweight"], self.bits, _NIBBLES).t()
        zeros = unpacked(tensors["qzeros"], self.bits, _NIBBLES)
        groups = torch.arange(codes.shape[1]) // (codes.shape[1] // len(zeros))
        return _grouped(codes, zeros, tensors["scales"], groups)

    def _scaled(self, tensors: Mapping[str, Tensor], scale: Tensor) -> Tensor:  # (O, I), in the dtype of the scale
        zeros = tensors.get("weight_zero_point")
        if "weight_packed" in tensors:
            O, I = (int(n) for n in tensors["weight_shape"])
            packed = tensors["weight_packed"]
            bits = next((bits for bits in (4, 8) if packed.shape == (O, -(-I * bits // 32))), None)
            if bits is None:
                raise ValueError(f"codes of shape {tuple(packed.shape)} are none of 4 or 8 bits of a {O}x{I} weight")
            codes = unpacked(packed, bits)[:, :I] - 2 ** (bits - 1)
            if zeros is not None:
                zeros = unpacked(zeros.t(), bits).t()[:O] - 2 ** (bits - 1)
        else:
            codes = tensors["weight"]
        values, (O, I) = codes.to(scale.dtype), codes.shape
        rows, columns = self._places(tensors, scale, O, I)
        found = scale.view(-1, scale.shape[-1] if scale.dim() else 1)
        offset = 0 if zeros is None else zeros.to(scale.dtype).view(found.shape)[rows][:, columns]
        return (values - offset) * found[rows][:, columns]

    def _places(self, tensors: Mapping[str, Tensor], scale: Tensor, O: int, I: int) -> tuple[Tensor, Tensor]:
        """Which scale each row and each column has."""
        rows, columns = torch.arange(O), torch.arange(I)
        if scale.numel() == 1:
            return rows * 0, columns * 0
        if scale.shape in ((O,), (O, 1)):
            if scale.dim() == 1:
                raise ValueError(f"scales of shape {tuple(scale.shape)} may be those of rows or columns")
            return rows, columns * 0
        if self.block is not None and scale.shape == (-(-O // self.block[0]), -(-I // self.block[1])):
            return rows // self.block[0], columns // self.block[1]
        groups = tensors.get("weight_g_idx")
        if groups is not None and (groups >= 0).all():
            return rows, groups.long()
        if scale.dim() == 2 and scale.shape[0] == O and I % scale.shape[1] == 0:
            return rows, columns // (I // scale.shape[1])
        raise ValueError(f"{self.name}: scales of shape {tuple(scale.shape)} do not fit a {O}x{I} weight")


def unpacked(packed: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:  # (R, C) -> (R, 32 C / bits)
    """The codes in every int32 of a row, the lowest bits first, or by `places`."""
    if packed.dtype != torch.int32:
        raise ValueError(f"packed codes must be int32, got {str(packed.dtype).removeprefix('torch.')}")
    shifts = torch.tensor(places or tuple(range(32 // bits)), dtype=torch.int32) * bits
    return (packed.unsqueeze(-1) >> shifts & (2**bits - 1)).flatten(-2)


def _grouped(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:  # (O, I), (S, O) twice, (I,)
    if scales.shape != zeros.shape or int(groups.max()) >= len(scales) or codes.shape[0] != scales.shape[1]:
        raise ValueError(
            f"codes of {tuple(codes.shape)}, zeros of {tuple(zeros.shape)} and scales of {tuple(scales.shape)} do not "
            "fit each other"
        )
    return (codes - zeros.t()[:, groups]).float() * scales.float().t()[:, groups]


def foreign_of(config: Mapping[str, Any], method: str) -> Foreign | None:
    """How the checkpoint with this `quantization_config` stores its weights; None if it is not read here."""
    if method == "gptq" and config.get("bits") in (2, 4, 8):
        first = config.get("checkpoint_format", "gptq")
        above = {"gptq": 1, "gptq_v2": 0}.get(first)
        return None if above is None else Foreign("gptq", config["bits"], config.get("group_size", -1), above)
    if method == "awq" and config.get("bits", config.get("w_bit")) == 4 and config.get("zero_point", True):
        return Foreign("awq") if str(config.get("version", "gemm")).lower() == "gemm" else None
    if (method == "modelopt" and config.get("quant_algo") == "FP8") or method == "fbgemm_fp8":
        return Foreign("fp8 with a scale")
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    return None


def _compressed_tensors(config: Mapping[str, Any]) -> Foreign | None:
    groups = list((config.get("config_groups") or {}).values())
    formats = {group.get("format") or config.get("format") for group in groups} or {config.get("format")}
    sparse = (config.get("sparsity_config") or {}).get("format", "dense")
    weights = [group.get("weights") or {} for group in groups]
    if not formats <= set(_READ) or sparse != "dense" or config.get("transform_config"):
        return None
    blocks = {tuple(one["block_structure"]) for one in weights if isinstance(one.get("block_structure"), list)}
    if len(blocks) > 1 or any(isinstance(one.get("block_structure"), str) for one in weights):
        return None
    return Foreign("compressed-tensors", block=next(iter(blocks), None))
