"""Write a checkpoint of the shape of LLaMA-2-7B with random weights: 13.5 GB in bfloat16, in three files.

    python benchmarks/make_checkpoint.py --out /somewhere/llama2-7b-random [--blocks 32] [--dtype bfloat16]

Weights are drawn from a normal distribution of width 0.02, seeded by the name of the tensor; norms are one.
"""

from __future__ import annotations

import argparse
import zlib
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig

from tensormix.models import skeleton
from tensormix.storage.entries import Piece
from tensormix.storage.memory import check_space
from tensormix.storage.safetensors import shard_name, write_index, write_shard

SHARD = 5_000_000_000  # bytes


def llama2_7b(blocks: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        architectures=["LlamaForCausalLM"],
    )


def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tensor = torch.empty(shape, dtype=dtype)
    for rows in tensor.split(1024):  # so that little more than the tensor itself is in memory
        rows.copy_(torch.randn(rows.shape, generator=generator) * 0.02)
    return tensor


def make(out: Path, blocks: int, dtype: torch.dtype) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config = llama2_7b(blocks)
    config.dtype = dtype
    config.save_pretrained(out)
    assert AutoConfig.from_pretrained(out).num_hidden_layers == blocks
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton(out).state_dict().items()}
    shards: list[dict[str, Piece]] = [{}]
    for name, shape in shapes.items():
        piece = Piece.made(partial(draw, name, shape, dtype), shape, dtype)
        if sum(other.num_bytes for other in shards[-1].values()) + piece.num_bytes > SHARD:
            shards.append({})
        shards[-1][name] = piece
    check_space(out, sum(piece.num_bytes for shard in shards for piece in shard.values()))
    files = [out / shard_name(number, len(shards)) for number in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        size, _ = write_shard(file, shard)
        print(f"{file.name}: {size / 1e9:.2f} GB", flush=True)
    write_index(files, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    asked = parser.parse_args()
    make(asked.out, asked.blocks, getattr(torch, asked.dtype))
