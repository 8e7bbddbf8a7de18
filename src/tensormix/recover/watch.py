"""What is noted while a model recovers, and when it is stopped: losses, checkpoints that are whole, divergence."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tensormix.rows import Row
from tensormix.storage.files import read_json, write_json

MARK = "whole.json"  # written into a checkpoint when everything else in it is: name and size of each file
PATIENCE = 3  # losses in a row that must be too high: the loss of one step jumps where few tokens count


class Watch(TrainerCallback):
    """Notes the losses, stops a run that diverges, and marks checkpoints that are whole.

    Args:
        steps_before: steps of this recovery that were done elsewhere (block by block); rows and progress count them.
        phase: which loss a step of the trainer has; divergence is judged within one.
        diverged: nats above the lowest loss of a phase; the run is stopped when three losses in a row are higher, or at
            once where one is no number (None: only there).
        judge: asked at every checkpoint; True stops the recovery, whose outcome is clear.
        held_out: the rows of the judgements so far, which a checkpoint keeps beside its own.
    """

    def __init__(
        self,
        tokens_per_step: int,
        progress: Callable[[int, int], None] | None,
        *,
        steps_before: int,
        phase: Callable[[int], str],
        diverged: float | None,
        judge: Callable[[Any, int], bool] | None = None,
        held_out: list[Row] | None = None,
    ) -> None:
        self.held_out = [] if held_out is None else held_out
        self.rows: list[Row] = []
        self.tokens_per_step, self.progress, self.began = tokens_per_step, progress, time.perf_counter()
        self.steps_before, self.phase, self.diverged, self.judge = steps_before, phase, diverged, judge

    def on_step_end(self, args, state, control, **_: Any) -> None:
        if self.progress is not None:
            self.progress(self.steps_before + state.global_step, self.steps_before + state.max_steps)

    def on_log(self, args, state, control, logs: dict | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        step, loss, phase = self.steps_before + state.global_step, float(logs["loss"]), self.phase(state.global_step)
        rate = float(logs["learning_rate"])
        earlier = [row for row in self.rows if row["phase"] == phase]
        lowest = min((row["loss"] for row in earlier if row["loss"] != 0), default=math.inf)  # 0: nothing counted there
        recent = [*earlier[1 - PATIENCE :], {"step": step, "loss": loss}]
        high = self.diverged is not None and all(row["loss"] > lowest + self.diverged for row in recent)
        if not math.isfinite(loss) or (high and len(recent) == PATIENCE):
            first = recent[0]["step"] if math.isfinite(loss) else step  # lost with what the step before it had made
            drop_checkpoints(Path(args.output_dir), first - self.steps_before - 1)
            raise ValueError(self._diverged(Path(args.output_dir), step, loss, lowest, rate, args.learning_rate))
        self.rows.append(
            {
                "kind": "loss",
                "step": step,
                "phase": phase,
                "loss": loss,
                "learning_rate": rate,
                "tokens": step * self.tokens_per_step,
                "seconds": round(time.perf_counter() - self.began, 3),
            }
        )

    def _diverged(self, folder: Path, step: int, loss: float, lowest: float, rate: float, peak: float) -> str:
        """The sentence about a run that is lost."""
        before = f", after {lowest:.3g} at its best" if math.isfinite(lowest) else ""
        good = last_whole_checkpoint(folder)
        kept = f"the last good checkpoint is kept: {good}" if good else "there was no checkpoint yet (save_every)"
        return (
            f"recover: the loss is {loss:.3g} at step {step}, learning rate {rate:.3g}{before}: the run diverges and "
            f"was stopped; {kept}. Lower learning_rate (now {peak:g}) or raise warmup."
        )

    def on_save(self, args, state, control, model: Any = None, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / MARK, {"files": _sizes(folder), "rows": self.rows, "held_out": self.held_out})
        if self.judge is not None and self.judge(model, self.steps_before + state.global_step):
            control.should_training_stop = True


def drop_checkpoints(folder: Path, first: int) -> None:
    """Remove the checkpoints of step `first` and later: a run that goes on must not start from a lost one."""
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) >= first:
            shutil.rmtree(checkpoint)


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file() and file.name != MARK}


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose mark is there and agrees with its files; one cut off while being written has none."""
    whole = [
        checkpoint
        for checkpoint in folder.glob("checkpoint-*")
        if (checkpoint / MARK).exists() and read_json(checkpoint / MARK)["files"] == _sizes(checkpoint)
    ]
    return max(whole, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)
