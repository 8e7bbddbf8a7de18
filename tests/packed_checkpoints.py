"""Tiny checkpoints whose weights are packed in fp8 or MXFP4, and what they hold when unpacked."""

from __future__ import annotations

import json
import shutil
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tensormix.storage.packed import dequantize_fp8, dequantize_mxfp4
from zoo import make

Tensors = dict[str, Tensor]
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def fp8_config(block: tuple[int, int] | None = (128, 128)) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": block and list(block), "activation_scheme": "dynamic"}


def save_packed(folder: Path, family: str, block: tuple[int, int] | None = (128, 128)) -> Tensors:
    """Save a random model with packed weights to folder/"packed", and the same as plain bf16 to folder/"plain".

    GPT-OSS is packed in MXFP4, everything else in fp8. Returns the plain tensors by their names on disk.
    """
    model = make(family, **({"intermediate_size": 64} if family == "gpt_oss" else {})).to(torch.bfloat16)
    model.save_pretrained(folder / "plain")
    shutil.copytree(folder / "plain", folder / "packed")
    tensors = load_file(folder / "plain" / "model.safetensors")
    packed, plain = pack_mxfp4(tensors) if family == "gpt_oss" else pack_fp8(tensors, block)
    rewrite(folder / "packed", packed, MXFP4 if family == "gpt_oss" else fp8_config(block))
    rewrite(folder / "plain", plain, None)
    return plain


def pack_fp8(tensors: Tensors, block: tuple[int, int] | None) -> tuple[Tensors, Tensors]:
    """The linear weights packed, and what they then are. Without blocks some have one scale, some one for each row."""
    packed, plain = dict(tensors), dict(tensors)
    for number, (name, weight) in enumerate(sorted(tensors.items())):
        if not name.endswith("proj.weight"):
            continue
        O, I = weight.shape
        rows, columns = block or ((O, I) if number % 2 else (1, I))
        scale = 0.5 + torch.rand(ceil(O / rows), ceil(I / columns), generator=torch.Generator().manual_seed(number))
        codes = weight.float() / scale.repeat_interleave(rows, 0)[:O].repeat_interleave(columns, 1)[:, :I]
        packed[name] = codes.to(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = scale if scale.numel() > 1 else scale[0, 0]
        plain[name] = dequantize_fp8(packed[name], scale, block, torch.bfloat16)
    return packed, plain


def pack_mxfp4(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The experts of a GPT-OSS replaced by random codes, and what they then are."""
    packed, plain = dict(tensors), dict(tensors)
    for number, (name, weight) in enumerate(sorted(tensors.items())):
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        E, I, O = weight.shape
        generator = torch.Generator().manual_seed(number)
        blocks = torch.randint(256, (E, O, I // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 126, (E, O, I // 32), dtype=torch.uint8, generator=generator)
        del packed[name]
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
        plain[name] = dequantize_mxfp4(blocks, scales, torch.bfloat16)
    return packed, plain


def rewrite(folder: Path, tensors: Tensors, quantization_config: dict[str, Any] | None) -> None:
    """Replace the weights in a folder, and what its config says about them."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(config))
