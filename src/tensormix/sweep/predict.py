"""Where a model will break, before any recovery: signals of every depth from one walk over the blocks.

    drift            mean |S - S_dense| over all pairs of layers (arXiv 2605.25344, Eq. 5), at the exam's answers
    output_entropy   how undecided the four answer logits are (Eq. 3)
    divergence       KL(dense || compressed) of all logits at the same place, in nats
    local_error      what is left of each block's error after a few thousand tokens of local distillation, summed over
                     the compressed blocks; 1 for a block that is as good as left out
    effective_rank   |log of the effective rank over the dense model's| of the states behind the last block at the same
                     place (Roy and Vetterli 2007): how many directions tell the questions apart

Each of them grows with the damage, so each ranks the depths; the boundary is said to be where it rises most from one
depth to the next. The prediction is the lower median of what the first four say, and their range is its uncertainty;
the effective rank came after that rule, which no measured boundary may change, and has no say in it.
Nothing is fitted to any model: how far the prediction is from boundaries that were measured is in docs/boundary.md.

Blocks are compressed one after another in the order of the direction. What enters a block depends on the blocks before
it only, and those are the same at every depth that compresses it, so one walk gives the models of all depths.
"""

from __future__ import annotations

import copy
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from tensormix.compression import compress
from tensormix.data import Mixture, windows_of
from tensormix.diagnose.geometry import last_states, similarity_map
from tensormix.diagnose.table import Diagnose
from tensormix.evaluate import ChoicePrompt, exam_prompts
from tensormix.evaluate.choices import answer_tokens, encode
from tensormix.evaluate.forward import device_of, logits_at, pad_right, quiet
from tensormix.methods.base import Method
from tensormix.models import ModelSource, load_model
from tensormix.plan import Plan, Rule
from tensormix.recipe import Cell, Direction, Sweep, schedule
from tensormix.recover.local import distill_blocks
from tensormix.recover.rates import compressed_parameters
from tensormix.rows import Row
from tensormix.settings import Exam, Source
from tensormix.sites import blocks
from tensormix.sweep.depths import cell_recipe

SIGNALS = ("drift", "output_entropy", "divergence", "local_error", "effective_rank")
WITHOUT_A_SAY = {"effective_rank"}


def predict(
    sweep: Sweep,
    *,
    direction: Direction = "last",
    variant: str | None = None,
    num_prompts: int | None = None,
    local_tokens: int = 2048,
    local_rate: float = 1e-3,
) -> list[Row]:
    """Signals of every depth (kind "signal") and what they say (kind "prediction", depth None where nothing rises).

    Args:
        sweep: whose recipe names the model, the methods and the text; nothing is recovered.
        direction: in which blocks are compressed, one after another.
        variant: which method of the sweep, by the name that its cells end in; without it the first.
        num_prompts: questions of the exam at which the model is looked at; without it those of the recipe's diagnosis.
        local_tokens: tokens that each block is trained on alone, in windows of the recipe's recovery.

    Raises:
        ValueError: as `compress`, for a direction or a variant that the sweep does not know, and for a tokenizer that
            cannot answer the exam.
    """
    if direction not in get_args(Direction) or direction == "single":
        known = ", ".join(name for name in get_args(Direction) if name != "single")
        raise ValueError(f"predict: direction must be one of {known}, got {direction!r}")
    recipe = sweep.recipe
    assert recipe is not None  # Sweep.load and its validator see to it
    source = ModelSource(recipe.model)
    dense: Any = load_model(source, dtype="float32")
    tokenizer = source.tokenizer()
    num_blocks = len(blocks(dense))
    order = schedule(direction, num_blocks)
    cell = Cell(direction=direction, blocks=order, method=_variant(sweep, variant))
    (rule,) = cell_recipe(recipe, cell).plan.root
    settings = recipe.calibration
    batches = None
    if settings is not None:
        batches = windows_of(tokenizer, settings, recipe.seed)
    asked = num_prompts or (recipe.diagnose or Diagnose()).num_prompts
    prompts = exam_prompts((recipe.evaluate.exam or Exam()).model_copy(update={"num_questions": asked}))
    looks = _Looks(dense, tokenizer, prompts)
    rows = looks.rows(dense, 0)
    model = copy.deepcopy(dense)
    for depth, block in enumerate(order, 1):
        compress(model, _one_block(rule, rule.method, block), batches)
        rows += looks.rows(model, depth)
    errors = _local_errors(dense, rule, tokenizer, recipe, batches, local_tokens, local_rate)
    total = 0.0
    rows.append({"kind": "signal", "signal": "local_error", "depth": 0, "value": 0.0})
    for depth, block in enumerate(order, 1):
        total += errors.get(block, 0.0)
        rows.append({"kind": "signal", "signal": "local_error", "depth": depth, "value": total})
    return rows + prediction_rows(rows)


def _variant(sweep: Sweep, name: str | None) -> Method:
    cells = [Cell(direction="single", blocks=(0,), method=method, settings=own) for method, own in sweep.variants()]
    known = {cell.variant: cell.method for cell in cells}
    if name is not None and name not in known:
        raise ValueError(f"predict: the sweep has no method {name!r}; it has {', '.join(known)}")
    return known[name or next(iter(known))]


def prediction_rows(rows: list[Row]) -> list[Row]:
    """What each signal says, and the lower median of those with a say, with their range (`low`, `high`), as rows of
    kind "prediction"."""
    said: dict[str, int | None] = {}
    for signal in dict.fromkeys(row["signal"] for row in rows):
        values = sorted((row["depth"], row["value"]) for row in rows if row["signal"] == signal)
        said[signal] = largest_rise(values)
    found = [{"kind": "prediction", "signal": signal, "depth": depth} for signal, depth in said.items()]
    depths = sorted(depth for signal, depth in said.items() if depth is not None and signal not in WITHOUT_A_SAY)
    middle = depths[(len(depths) - 1) // 2] if depths else None
    ends = {"low": depths[0], "high": depths[-1]} if depths else {"low": None, "high": None}
    return [*found, {"kind": "prediction", "signal": "all", "depth": middle, **ends}]


def largest_rise(values: list[tuple[int, float]]) -> int | None:
    """The depth at which a signal, given as (depth, value) by depth, rises most from the depth before; None if none."""
    rises = [(after - before, depth) for (_, before), (depth, after) in pairwise(values)]
    best = max(rises, key=lambda rise: rise[0], default=(0.0, 0))
    return best[1] if best[0] > 0 else None


def effective_rank(states: Tensor) -> Tensor:  # (P, D) -> ()
    """exp of the entropy of the singular values as shares of their sum, around the mean state (Roy, Vetterli 2007).

    From 1, where the states differ in one direction or in none, to the smaller of P - 1 and D.
    """
    values = torch.linalg.svdvals((states - states.mean(0)).double())
    return torch.special.entr(values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)).sum().exp()


def rank_agreement(signal: list[float], accuracy: list[float]) -> float:
    """Kendall's tau-b between a signal of damage and the loss of accuracy: 1 if they rank the depths alike."""
    pairs = [(i, j) for i in range(len(signal)) for j in range(i)]
    one = [_sign(signal[i] - signal[j]) for i, j in pairs]
    other = [_sign(accuracy[j] - accuracy[i]) for i, j in pairs]
    agreement = sum(a * b for a, b in zip(one, other, strict=True))
    untied = sum(map(abs, one)) * sum(map(abs, other))
    return agreement / untied**0.5 if untied else 0.0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _one_block(rule: Rule, method: Method, block: int) -> Plan:
    return Plan((rule.model_copy(update={"blocks": str(block), "method": method}),))


class _Looks:
    """Looks at models at the same prompts, and compares them with the dense one."""

    def __init__(self, dense: Any, tokenizer: Any, prompts: list[ChoicePrompt]) -> None:
        self.tokenizer, self.prompts, self.answers = tokenizer, prompts, answer_tokens(tokenizer)
        states = last_states(dense, tokenizer, prompts)
        self.similarity, self.rank, self.logits = (
            similarity_map(states),
            effective_rank(states[:, -1]),
            self._last(dense),
        )

    def rows(self, model: Any, depth: int) -> list[Row]:
        states = last_states(model, self.tokenizer, self.prompts)
        similarity = similarity_map(states)
        logits = self._last(model)
        upper = torch.ones_like(similarity, dtype=torch.bool).triu(1)
        dense, here = self.logits.log_softmax(-1), logits.log_softmax(-1)
        four = logits[:, self.answers].softmax(-1)
        values = {
            "drift": (similarity - self.similarity).abs()[upper].mean(),
            "output_entropy": torch.special.entr(four).sum(-1).mean() / torch.tensor(4.0).log(),
            "divergence": (dense.exp() * (dense - here)).sum(-1).mean(),
            "effective_rank": (effective_rank(states[:, -1]) / self.rank).log().abs(),
        }
        return [{"kind": "signal", "signal": name, "depth": depth, "value": float(v)} for name, v in values.items()]

    def _last(self, model: Any) -> Tensor:  # (P, V)
        ids = encode(model, self.tokenizer, self.prompts)
        parts = []
        with quiet(model):
            for start in range(0, len(ids), 16):
                rows, last = pad_right(ids[start : start + 16], device_of(model))
                parts.append(logits_at(model, rows, last).cpu())
        return torch.cat(parts)


def _local_errors(
    dense: Any, rule: Rule, tokenizer: Any, recipe: Any, batches: Any, tokens: int, rate: float
) -> dict[int, float]:
    """Of every block, its error on dense inputs after it was trained alone on a few tokens."""
    model, recover = copy.deepcopy(dense), recipe.recover
    compress(model, Plan((rule,)), batches, inputs="dense")
    sources = recover.text if recover else (Source(exam=True),)
    window = min(recover.window if recover else 256, tokens)
    per_step = max(1, 256 // window)  # many small steps from few tokens
    steps = max(1, tokens // (window * per_step))
    mixture = Mixture(tokenizer, sources, window=window, num_windows=steps * per_step, seed=recipe.seed)
    ids = torch.stack([mixture[i]["input_ids"] for i in range(len(mixture))])
    with tempfile.TemporaryDirectory() as folder:
        rows = distill_blocks(
            model,
            dense.requires_grad_(False),
            list(ids.split(per_step)),
            trained=compressed_parameters(model),
            inputs="dense",
            learning_rate=rate,
            warmup=0.1,
            weight_decay=0.0,
            core_rate="same",
            autocast=None,
            folder=Path(folder),
            progress=lambda done: None,
        )
    return {row["block"]: row["after"] for row in rows}
