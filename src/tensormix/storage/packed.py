"""Weights that a checkpoint stores packed, in block-scaled fp8 or in MXFP4, as plain tensors; no models, no files.

Shape letters: O out_features, I in_features, E experts, G groups of 32 inputs (I = 32 G).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from tensormix.storage.foreign import Foreign, foreign_of

FP8 = torch.float8_e4m3fn
_GROUP = 32  # inputs that share one scale in MXFP4
_ROWS = 128  # of an fp8 weight that are in fp32 at the same time
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits of a code; the fourth is the sign
_PACKED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint8, torch.int8)
# Role of a stored tensor -> what its name adds to the name of the weight that it belongs to.
_SUFFIXES = {
    "fp8": {"weight": "", "scale": "_scale_inv"},
    "mxfp4": {"blocks": "_blocks", "scales": "_scales"},
}


@dataclass(frozen=True)
class Pack:
    """How a checkpoint packs its weights, and by which names the parts of one weight are stored.

    Attributes:
        name: "fp8" or "mxfp4".
        block: of fp8, how many rows and columns share one scale; None where there is one per tensor or per row.
    """

    name: str
    block: tuple[int, int] | None = None
    is_kept = True  # what is not compressed stays as it is

    def dense_name(self, stored: str) -> str:
        """The weight that the stored tensor is a part of; its own name if it is a whole one."""
        if self.name == "fp8" and _last(stored) == "activation_scale":
            return stored.removesuffix("activation_scale") + "weight"
        for suffix in _SUFFIXES[self.name].values():
            if suffix and stored.endswith(suffix):
                return stored.removesuffix(suffix)
        return stored

    def companions(self, name: str, stored: Container[str]) -> dict[str, str]:
        """Role -> name of the stored tensor, for everything that makes the weight `name`.

        `stored` is all that the checkpoint holds. Of a tensor that is not packed it is {"weight": name}. The size of
        the weight on disk is that of all these tensors together. The role "activation_scale", if there is one, is for
        kernels that multiply in fp8; `unpack` does not need it.

        Raises:
            ValueError: one part is there and another is missing.
        """
        parts = {role: name + suffix for role, suffix in _SUFFIXES[self.name].items()}
        if not any(part in stored for part in parts.values() if part != name):
            return {"weight": name}
        if missing := [part for part in parts.values() if part not in stored]:
            raise ValueError(f"{name} is packed, but {missing[0]} is missing; the checkpoint is incomplete")
        activation = name.removesuffix("weight") + "activation_scale"
        if self.name == "fp8" and _last(name) == "weight" and activation in stored:
            parts["activation_scale"] = activation
        return parts

    def unpack(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, from its parts by role as `companions` names them; what is not packed is cast.

        Raises:
            ValueError: as `dequantize_fp8` and `dequantize_mxfp4`, or a packed weight comes without its scales.
        """
        if "scale" in tensors:
            return dequantize_fp8(tensors["weight"], tensors["scale"], self.block, dtype)
        if "blocks" in tensors:
            return dequantize_mxfp4(tensors["blocks"], tensors["scales"], dtype)
        weight = tensors["weight"]
        if weight.dtype in _PACKED_DTYPES:
            beside = " and ".join(f"'{suffix}'" for suffix in _SUFFIXES[self.name].values() if suffix)
            raise ValueError(
                f"stored as {_short(weight.dtype)} without scales; in a checkpoint packed as {self.name} they "
                f"lie beside the weight under its name and {beside}"
            )
        return weight.to(dtype) if weight.is_floating_point() else weight


def pack_of(config: Mapping[str, Any] | None) -> Pack | Foreign | None:
    """How the checkpoint with this `quantization_config` is packed; None without one.

    Raises:
        ValueError: it is packed in a way that is not read here.
    """
    if not config:
        return None
    method = getattr(config.get("quant_method"), "value", config.get("quant_method"))
    if method == "mxfp4":
        return Pack("mxfp4")
    if method == "fp8" and config.get("expert_dtype", "fp8") == "fp8":
        block = config.get("weight_block_size")
        if block is not None and (len(block) != 2 or min(block) < 1):
            raise ValueError(f"quantization_config: weight_block_size must be two numbers from 1 on, got {block!r}")
        return Pack("fp8", None if block is None else (int(block[0]), int(block[1])))
    if (foreign := foreign_of(config, str(method))) is not None:
        return foreign
    what = "'fp8' with experts in 'fp4'" if method == "fp8" else repr(method)
    raise ValueError(
        f"the checkpoint is packed as {what}{_details(config)}; plain weights, 'fp8', 'mxfp4', and of 'gptq', 'awq', "
        "'compressed-tensors' and 'modelopt' the usual layouts can be read. Take the model's original checkpoint, or "
        "convert this one where its own library runs: AutoModelForCausalLM.from_pretrained(folder), dequantize(), "
        "save_pretrained(new_folder)"
    )


def _details(config: Mapping[str, Any]) -> str:
    """What tells a layout from others of its kind."""
    keys = ("bits", "checkpoint_format", "version", "zero_point", "quant_algo", "format", "load_in_8bit")
    found = [f"{key} {config[key]!r}" for key in keys if config.get(key) is not None]
    return f" ({', '.join(found)})" if found else ""


def dequantize_fp8(
    weight: Tensor, scale_inv: Tensor, block: tuple[int, int] | None = (128, 128), dtype: torch.dtype = torch.bfloat16
) -> Tensor:  # (O, I) or (E, O, I) -> the same shape
    """Each code times its scale in fp32, then cast, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3.2).

    Args:
        weight: float8_e4m3fn.
        scale_inv: (ceil(O/b), ceil(I/c)) for a `block` of (b, c), where those at the edges may be cut; or one for
            each row, (O, 1) or (O,); or one for all. With experts there is an (E, ...) in front.

    Raises:
        ValueError: a dtype or a shape is wrong, a code is NaN or a scale not finite, or the result overflows `dtype`.
    """
    if weight.dtype != FP8:
        raise ValueError(f"fp8: the weight must be {_short(FP8)}, got {_short(weight.dtype)}")
    if weight.dim() not in (2, 3) or not scale_inv.is_floating_point():
        raise ValueError(
            "fp8: the weight must be (O, I) or (E, O, I) and its scales floating point, "
            f"got {tuple(weight.shape)} and scales in {_short(scale_inv.dtype)}"
        )
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if weight.dim() == 2:
        _fill_fp8(out, weight, scale_inv, block)
        return out
    if scale_inv.dim() == 0 or scale_inv.shape[0] != weight.shape[0]:
        raise ValueError(f"fp8: {weight.shape[0]} experts, but scales of shape {tuple(scale_inv.shape)}")
    for number in range(weight.shape[0]):
        _fill_fp8(out[number], weight[number], scale_inv[number], block)
    return out


def _fill_fp8(out: Tensor, weight: Tensor, scale_inv: Tensor, block: tuple[int, int] | None) -> None:  # (O, I)
    O, I = weight.shape
    scale, rows, columns = _grid(scale_inv.float(), O, I, block)
    _check(torch.isfinite(scale), "fp8: {} of {} scales are NaN or infinite")
    for start in range(0, O, _ROWS):
        part = weight[start : start + _ROWS].float()
        _check(~part.isnan(), "fp8: {} of {} codes are NaN (0x7f or 0xff)")
        which = torch.arange(start, start + len(part), device=scale.device) // rows
        out[start : start + _ROWS] = part * scale[which].repeat_interleave(columns, 1)[:, :I]
    _check_fits(out, "fp8")


def _grid(scale: Tensor, O: int, I: int, block: tuple[int, int] | None) -> tuple[Tensor, int, int]:
    """The scales as a matrix, and how many rows and columns of the weight share each of them."""
    if scale.numel() == 1:
        return scale.view(1, 1), O, I
    if block is not None and scale.shape == (ceil(O / block[0]), ceil(I / block[1])):
        return scale, *block
    if scale.shape in ((O,), (O, 1)):
        return scale.view(O, 1), 1, I
    blocks = f"{(ceil(O / block[0]), ceil(I / block[1]))} for blocks of {block}, " if block else ""
    raise ValueError(
        f"fp8: scales of shape {tuple(scale.shape)} do not fit a {O}x{I} weight; allowed are {blocks}"
        f"({O}, 1) for one per row, and a single one"
    )


def dequantize_mxfp4(
    blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:  # (E, O, G, 16), (E, O, G) -> (E, I, O)
    """Two e2m1 values in each byte, the low nibble first, times 2^(scale - 127); as in the OCP MX formats, version 1.0.

    The result is transposed and contiguous, which is how the experts of GPT-OSS hold their weights.

    Args:
        blocks: uint8, 32 values in 16 bytes.
        scales: uint8, one for each group of 32.

    Raises:
        ValueError: a dtype or a shape is wrong, a scale is NaN, or the result overflows `dtype`.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(
            f"mxfp4: blocks and scales must be uint8, got {_short(blocks.dtype)} and {_short(scales.dtype)}"
        )
    if blocks.dim() != 4 or blocks.shape[3] != _GROUP // 2 or scales.shape != blocks.shape[:3]:
        raise ValueError(
            "mxfp4: the blocks must be (E, O, G, 16) and the scales (E, O, G), "
            f"got {tuple(blocks.shape)} and {tuple(scales.shape)}"
        )
    _check(scales != 255, "mxfp4: {} of {} scales are NaN (255)")
    E, O, G, _ = blocks.shape
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=blocks.device)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)  # (256, 2), by the byte
    powers = torch.tensor([2.0 ** (code - 127) for code in range(255)], device=blocks.device)
    out = torch.empty(E, G * _GROUP, O, dtype=dtype, device=blocks.device)
    for number in range(E):  # so that only one expert is ever in fp32
        expert = pairs[blocks[number].int()].flatten(-2) * powers[scales[number].int()][..., None]  # (O, G, 32)
        out[number] = expert.flatten(-2).t()
        _check_fits(out[number], "mxfp4")
    return out


def _check(good: Tensor, sentence: str) -> None:
    if not good.all():
        raise ValueError(sentence.format(int((~good).sum()), good.numel()))


def _check_fits(values: Tensor, name: str) -> None:
    _check(torch.isfinite(values), f"{name}: {{}} of {{}} values are too large for {_short(values.dtype)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _last(name: str) -> str:
    return name.rpartition(".")[2]
