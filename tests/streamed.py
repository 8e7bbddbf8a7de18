"""Checkpoints that are compressed from disk to disk, and what of them is compared."""

from __future__ import annotations

from pathlib import Path

from tensormix.methods import DropBlocks, MeanOutput, Mixt, SvdLlm
from tensormix.plan import Plan, Rule
from tensormix.storage.safetensors import file_hash
from zoo import make, token_ids

PLANS = {
    "weights_only": Plan((Rule(method=Mixt(num_branches=2)),)),
    "calibrated": Plan((Rule(method=DropBlocks(), blocks="1"), Rule(method=MeanOutput(), blocks="0,3"))),
    "both_streams": Plan((Rule(method=SvdLlm(keep=0.5, update=True), blocks="0,2"),)),
}
BATCHES = [token_ids(seed=1), token_ids(seed=2, length=7)]


def save_dense(folder: Path) -> Path:
    make("qwen3").save_pretrained(folder, max_shard_size="40KB")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: file_hash(file) for file in sorted(folder.iterdir())}


def stop_at(number: int):
    def progress(done: int, planned: int, name: str) -> None:
        if done == number:
            raise KeyboardInterrupt

    return progress


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix != ".lock")
