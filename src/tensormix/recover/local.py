"""Local distillation: each compressed block is trained alone to give what the dense block gives.

Block by block from the input side, and every block reads the same windows once: `num_steps` batches. The target is what
the dense block makes of the dense model's hidden states; what enters the block is the same states, or what the blocks
trained before it make of the text (propagated), so that a later block also mends what an earlier one could not.

A finished block lies in a file of `folder`, so that a call that was stopped goes on at the block it was at.

Shape letters: B windows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tensormix.recover.rates import compressed_parameters, parameter_groups
from tensormix.rows import Row
from tensormix.sites import blocks
from tensormix.sites.calls import Activations, Call
from tensormix.sites.through import Blocks, through
from tensormix.storage.files import new_file, read_json, write_json


def learning_blocks(model: nn.Module, trained: set[nn.Parameter]) -> list[int]:
    """The blocks with a compressed layer that has something to learn."""
    return [index for index, block in enumerate(blocks(model)) if compressed_parameters(block) & trained]


def distill_blocks(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Tensor],  # (B, T) each: one step of every block
    *,
    trained: set[nn.Parameter],
    inputs: str,  # propagated or dense
    learning_rate: float,
    warmup: float,
    weight_decay: float,
    core_rate: str,
    autocast: torch.dtype | None,
    folder: Path,
    progress: Callable[[int], None],
) -> list[Row]:
    """Train the blocks of `student` in place; returns a row of kind "local_loss" for each.

    `loss` in a row is the mean squared error in units of what the dense block adds to its input: 1 is as bad as leaving
    the block out. `before` is that of the first batch, `after` the mean of the last tenth of the batches.

    Raises ValueError if a loss is not finite.
    """
    learning = learning_blocks(student, trained)
    keep = Activations(folder / "activations").keep
    passes = (through(model, Blocks(), batches, keep) for model in (student, teacher))
    rows: list[Row] = []
    for index, (ours, theirs) in enumerate(zip(*passes, strict=True)):
        if index > max(learning, default=-1):
            break
        entering = {"dense": list(theirs.hidden["dense"]), "propagated": ours.hidden["dense"]}
        targets = theirs.pass_on("dense")
        if index in learning:
            (block,) = ours.modules
            data = _Block(ours.calls["dense"][index], entering[inputs], targets, entering["dense"])
            groups = parameter_groups(block, trained, learning_rate, core_rate)
            train = partial(data.train, block, groups, warmup=warmup, weight_decay=weight_decay, autocast=autocast)
            found = _once(folder / f"block-{index:04d}.safetensors", block, train)
            rows.append({"kind": "local_loss", "block": index} | found)
            progress(len(rows) * len(batches) // len(learning))
    return rows


def _once(file: Path, block: nn.Module, train: Callable[[], Row]) -> Row:
    """What `train` says of the block; if that was done before, the weights that it left and what it said then."""
    said = file.with_suffix(".json")
    if file.exists() and said.exists():
        block.load_state_dict(load_file(file))
        return read_json(said)
    row = train()
    with new_file(file) as handle:
        handle.write(save({name: t.contiguous() for name, t in block.state_dict().items()}))
    write_json(said, row)
    return row


class _Block:
    """What one block is trained on: how it is called, what enters it, what should leave it."""

    def __init__(
        self, calls: list[Call], inputs: list[Tensor], targets: list[Tensor], dense_inputs: list[Tensor]
    ) -> None:
        self.calls, self.inputs, self.targets = calls, inputs, targets
        added = [float((t - h).double().square().mean()) for t, h in zip(targets, dense_inputs, strict=True)]
        self.unit = max(sum(added) / len(added), torch.finfo(torch.float32).tiny)

    def train(
        self,
        block: nn.Module,
        groups: list[dict[str, Any]],
        *,
        warmup: float,
        weight_decay: float,
        autocast: torch.dtype | None,
    ) -> Row:
        """AdamW with a linear warm-up and a cosine to zero over all batches, each read once."""
        began, num_steps, losses = time.perf_counter(), len(self.calls), []
        optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
        peaks = [group["lr"] for group in optimizer.param_groups]
        first = max(1, math.ceil(warmup * num_steps))
        for step, (call, states, target) in enumerate(zip(self.calls, self.inputs, self.targets, strict=True)):
            done = max(0, step + 1 - first) / max(1, num_steps - first + 1)
            share = min((step + 1) / first, 0.5 * (1 + math.cos(math.pi * done)))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = share * peak
            with torch.autocast(states.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                out = call.run(block, states)
            loss = (out.float() - target.float()).square().mean() / self.unit
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"recover: the loss of a block is {loss.item()} at local step {step + 1}, "
                    f"learning rate {share * peaks[0]:.3g}; lower learning_rate or raise warmup."
                )
            loss.backward()
            parameters = [p for group in groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        tail = losses[-max(1, num_steps // 10) :]
        return {
            "before": losses[0],
            "after": sum(tail) / len(tail),
            "steps": num_steps,
            "tokens": sum(states.shape[0] * states.shape[1] for states in self.inputs),
            "seconds": round(time.perf_counter() - began, 3),
        }
