"""What a recovery is judged by: the loss on windows of its text that it never learns from. The best state is kept.

Shape letters: B windows, T tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from transformers import TrainerCallback

from tensormix.data import IGNORED, Mixture
from tensormix.recover.losses import counted, keep, kept_divergence
from tensormix.recover.trainer import kept_of
from tensormix.rows import Row
from tensormix.settings import Recover
from tensormix.storage.files import new_file

NUM_KEPT = 256  # logits that are kept, and tokens drawn beside them, of every position that a teacher judges


class Judgements(TrainerCallback):
    """Judges the model at the start, at the steps `at`, and at the end; the best state lies in a file until then.

    The loss is the one that the recovery ends with, in nats over the tokens that count: the cross-entropy of the next
    token, or where the windows carry what a teacher says, the divergence from it.

    Args:
        windows: input_ids (T,) and labels (T,) of each, and the parts of `Kept` as teacher_NAME where a teacher
            judges; without any window nothing is judged and the last state is kept.
        num_own: how many of them, the first, are of the text that is learned from, and the rest of other texts; None
            where all are. The rows then say the loss of each.
        trained: the parameters that change, by name.
        file: for the best state; it stays until `finish`, so that a recovery that was stopped knows it.
        steps_before: steps of this recovery that the trainer does not count.
    """

    def __init__(
        self,
        windows: Sequence[Mapping[str, Tensor]],
        trained: Mapping[str, nn.Parameter],
        file: Path,
        *,
        at: set[int],
        num_own: int | None = None,
        steps_before: int = 0,
        batch_size: int = 1,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.windows, self.trained, self.file = windows, dict(trained), file
        self.num_own = num_own
        self.at, self.steps_before, self.batch_size, self.autocast = at, steps_before, batch_size, autocast
        self.rows: list[Row] = []

    def judge(self, model: Any, step: int) -> None:
        """Note the loss at `step`, unless that is done; keep the state if none before it was better."""
        if not self.windows or any(row["step"] == step for row in self.rows):
            return
        own, other = self._losses(model)
        loss, num_tokens = (own[0] + other[0]) / max(1, own[1] + other[1]), own[1] + other[1]
        by = "kl" if "teacher_tokens" in self.windows[0] else "lm"
        row: Row = {"kind": "held_out", "step": step, "by": by, "loss": loss, "tokens": num_tokens}
        if self.num_own is not None:
            row |= {"in_domain": own[0] / max(1, own[1]), "elsewhere": other[0] / max(1, other[1])}
        self.rows.append(row)
        best = self._best()
        if best is None or loss < best["loss"]:
            tensors = {name: p.detach().cpu().contiguous() for name, p in self.trained.items()}
            with new_file(self.file) as handle:
                handle.write(save(tensors, {"best": json.dumps({"step": step, "loss": loss})}))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = self.steps_before + state.global_step
        if step in self.at:
            self.judge(model, step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.judge(model, self.steps_before + state.global_step)  # also of a recovery that was ended early

    def finish(self, model: Any) -> list[Row]:
        """Put the best state back; the rows, the last of which says which state was kept."""
        best = self._best()
        if best is None:
            return []
        with torch.no_grad():
            for name, value in load_file(self.file).items():
                self.trained[name].copy_(value)
        self.file.unlink()
        self.rows.sort(key=lambda row: row["step"])
        start, end = self.rows[0], self.rows[-1]
        kept = {"kind": "kept", "step": best["step"], "loss": best["loss"], "start": start["loss"], "end": end["loss"]}
        at_best = next(row for row in self.rows if row["step"] == best["step"])
        said = [_sentence(kept, end["step"]), _side_by_side(start, at_best)]
        return [*self.rows, {**kept, "said": "\n".join(filter(None, said)) or None}]

    @torch.no_grad()
    def _losses(self, model: Any) -> tuple[tuple[float, int], tuple[float, int]]:
        """Sum over all tokens that count, and their number: of the text that is learned from, and of others."""
        device, training = next(iter(self.trained.values())).device, model.training
        computing = nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)
        num_own = len(self.windows) if self.num_own is None else self.num_own
        sums, counts = [0.0, 0.0], [0, 0]
        model.eval()
        with computing:
            for first in range(0, len(self.windows), self.batch_size):
                batch = default_collate(list(self.windows[first : first + self.batch_size]))
                batch = {key: value.to(device) for key, value in batch.items()}
                which = counted(batch["labels"], IGNORED)
                logits = model(batch["input_ids"], use_cache=False).logits[:, :-1][which]
                if "teacher_tokens" in batch:
                    losses = kept_divergence(logits, kept_of(batch, which))
                else:
                    losses = F.cross_entropy(logits.float(), batch["labels"][:, 1:][which], reduction="none")
                own = int(which[: max(0, num_own - first)].sum())
                for number, part in enumerate((losses[:own], losses[own:])):
                    sums[number] += float(part.sum())
                    counts[number] += len(part)
        model.train(training)
        return (sums[0], counts[0]), (sums[1], counts[1])

    def _best(self) -> Row | None:
        if not self.file.exists():
            return None
        with safe_open(self.file, "pt") as opened:
            return json.loads(opened.metadata()["best"])


def judged_windows(mixture: Mixture, settings: Recover) -> list[dict[str, Tensor]]:
    """What is held out of the text, and as many windows of the texts that are named beside it."""
    asked = settings.held_out
    if not asked.text or not asked.num_windows:
        return list(mixture.held_out)
    others = Mixture(
        mixture.tokenizer, asked.text, window=mixture.window, num_windows=asked.num_windows, seed=mixture.seed
    )
    return [*mixture.held_out, *(others[number] for number in range(len(others)))]


@torch.no_grad()
def taught(windows: Sequence[Mapping[str, Tensor]], teacher: Any) -> list[dict[str, Tensor]]:
    """The windows with what a teacher says of them."""
    found = []
    for number, window in enumerate(windows):
        logits = teacher(window["input_ids"][None].to(teacher.device), use_cache=False).logits[0, :-1]
        kept = keep(logits, NUM_KEPT, NUM_KEPT, seed=number)
        found.append({**window, **{f"teacher_{name}": value.cpu() for name, value in kept._asdict().items()}})
    return found


def judged_steps(steps: int, times: int) -> set[int]:
    """`times` steps, evenly spread, the last one among them."""
    return {round(steps * number / times) for number in range(1, times + 1)} - {0}


def _sentence(kept: Row, last: int) -> str | None:
    """What a user must know of a recovery whose last state was not its best; None where it was."""
    if kept["step"] == last:
        return None
    after = f"the loss on held-out text was {kept['start']:.3f} before it and {kept['end']:.3f} after {last} steps"
    lower = "lower learning_rate, or take more text"
    if kept["step"] == 0:
        return f"recovery did not help: {after}; the model is kept as it was before; {lower}"
    kept_state = f"the state of step {kept['step']} ({kept['loss']:.3f}) is kept"
    if kept["end"] > kept["start"]:
        return f"recovery ended worse than it began: {after}; {kept_state}; {lower}"
    return f"the last state was not the best: {after}; {kept_state}"


def _side_by_side(start: Row, kept: Row) -> str | None:
    """What the kept state makes of the text that is learned from, and of others; None where there are no others."""
    if "elsewhere" not in start:
        return None

    def change(name: str) -> str:
        before, after = (math.exp(row[name]) if row["by"] == "lm" else row[name] for row in (start, kept))
        return f"{before:.4g} to {after:.4g}"

    of = "perplexity" if start["by"] == "lm" else "divergence from the teacher"
    said = f"{of} on held-out windows: in-domain {change('in_domain')}, other texts {change('elsewhere')}"
    worse = kept["elsewhere"] > start["elsewhere"]
    return said + ("; it fits its own text at the cost of others" if worse else "")
