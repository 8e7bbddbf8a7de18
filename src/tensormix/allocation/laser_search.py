"""Which sites of a laser plan are reduced at all, and how far: the selection of LASER, with the model in memory.

What chooses does not judge: the questions, or the tokens of a text, are those that follow the ones of evaluate.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from tensormix.allocation.survey import in_place
from tensormix.compression.kinds import planned_units
from tensormix.compression.units import Unit
from tensormix.data import describe, packed_source, separator_of
from tensormix.evaluate import evaluate_choices, exam_prompts, perplexity, read_prompts
from tensormix.evaluate.batches import Asked
from tensormix.models import ModelSource, skeleton
from tensormix.plan import Plan, Rule
from tensormix.recipe import Recipe
from tensormix.rows import Row
from tensormix.settings import Evaluate, Perplexity, Search
from tensormix.sites import blocks, find_sites
from tensormix.storage.memory import available_memory

Score = Callable[[nn.Module], tuple[float, float]]  # accuracy (0 where there is none) and log-loss in nats
Pair = tuple[str, float]  # a site and a keep_rank to try there
Fitted = dict[Pair, nn.Module]


@dataclass(frozen=True)
class Found:
    """What a search came to: the sites as a plan and as {site: keep_rank}, a row for each trial, what was not tried."""

    plan: Plan
    chosen: dict[str, float]
    rows: list[Row]
    left_out: dict[str, list[float]]


def check_search(recipe: Recipe) -> None:
    """Raise ValueError, before any weight is read, if the search cannot be: as `candidates` and `scorer` do, or if the
    model cannot be held in memory.
    """
    assert recipe.search is not None
    source = ModelSource(recipe.model)
    model = skeleton(source, recipe.dtype)
    candidates(model, recipe.plan, recipe.search)
    scorer(source.tokenizer(), recipe.evaluate, recipe.search.part)
    weights = (*model.parameters(), *model.buffers())
    needed = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    free = [available_memory()] + ([torch.cuda.mem_get_info()[0]] if torch.cuda.is_available() else [])
    least = min((size for size in free if size is not None), default=needed)
    if needed > least:
        raise ValueError(
            f"search: it tries sites with the whole model in memory, which takes {needed / 1e9:.2f} GB in "
            f"{recipe.dtype}, and {least / 1e9:.2f} GB are free; take a smaller dtype, or a budget with "
            "by: spectrum, which reads one block at a time"
        )


def candidates(model: nn.Module, plan: Plan, search: Search) -> tuple[list[Pair], dict[str, list[float]]]:
    """What is tried at the sites of the plan, and what is not: too large or small a rank, or one that is there already.

    Reads shapes only. Raises ValueError if the plan does not fit the model, or if nothing can be tried at a site.
    """
    sites, pairs, left_out = find_sites(model), [], {}
    chosen: dict[str, Any] = dict(plan.resolve(sites, len(blocks(model))))
    for site in (site for site in sites if site.name in chosen):
        ranks: dict[str, float] = {}
        reason = ""
        for rate in search.keep_rank:
            try:
                operator = chosen[site.name].sized(rate).empty(site.in_features, site.out_features)
                ranks.setdefault(str(operator.spec), rate)
            except ValueError as error:
                reason = str(error)
        if not ranks:
            raise ValueError(f"search: no keep_rank of {list(search.keep_rank)} can be tried at {site.name}: {reason}")
        pairs += [(site.name, rate) for rate in ranks.values()]
        if others := [rate for rate in search.keep_rank if rate not in ranks.values()]:
            left_out[site.name] = others
    return pairs, left_out


def most_evaluations(pairs: Sequence[Pair]) -> int:
    """How often a search scores at most: the dense model, each pair alone, and each further site."""
    return len(pairs) + len({site for site, _ in pairs})


def plan_of(model: nn.Module, plan: Plan, chosen: Mapping[str, float]) -> Plan:
    """One rule for each site with the method that the plan has there at its keep_rank, in the order of the model."""
    sites = find_sites(model)
    methods = plan.resolve(sites, len(blocks(model)))
    return Plan(
        tuple(
            Rule(blocks=str(site.block), sites=re.escape(site.name), method=methods[site.name].sized(chosen[site.name]))
            for site in sites
            if site.name in chosen
        )
    )


@torch.no_grad()
def search_sites(
    model: nn.Module, plan: Plan, search: Search, score: Score, progress: Callable[[int, int], None]
) -> Found:
    """Try the sites of `plan` by the search of its method; the model is afterwards as it was.

    Raises ValueError as `candidates` and that search do, and for what a site cannot be fitted with.
    """
    pairs, left_out = candidates(model, plan, search)
    sites = {unit.name: unit for unit in planned_units(model, plan)}
    fitted: Fitted = {}
    done = [0]

    def score_of(choices: Mapping[str, float]) -> tuple[float, float]:
        for pair in fitted.keys() - choices.items():  # what was tried and not taken is freed
            del fitted[pair]
        with ExitStack() as stack:
            for pair in choices.items():
                if pair not in fitted:
                    fitted[pair] = _fit(sites[pair[0]], pair[1])
                # a copy, because the bias of the site becomes the operator's
                stack.enter_context(in_place(model, sites[pair[0]].sites[0], copy.deepcopy(fitted[pair])))
            result = score(model)
        done[0] += 1
        progress(done[0], most_evaluations(pairs))
        return result

    search_of = plan.root[0].method.search
    assert search_of is not None  # the recipe sees to it
    chosen, trials = search_of(pairs, score_of)
    rows = [
        {
            "kind": "trial",
            "choices": dict(trial.choices),
            "accuracy": trial.accuracy,
            "log_loss": trial.log_loss,
            "chosen": dict(trial.choices) == chosen,
        }
        for trial in trials
    ]
    return Found(plan_of(model, plan, chosen), {name: chosen[name] for name in sites if name in chosen}, rows, left_out)


def _fit(unit: Unit, keep_rank: float) -> nn.Module:
    (operator,) = type(unit)(unit.model, unit.method.sized(keep_rank), unit.sites).fit({}).operators.values()
    return operator


def scorer(tokenizer: Any, settings: Evaluate, part: float) -> tuple[Score, Row]:
    """What a model scores on questions that evaluate does not ask, and which these are.

    Accuracy and log-loss over the four answers, each question counted once; on text the accuracy is 0 and the log-loss
    the mean over tokens. `part` of all questions (or tokens) chooses, so that the rest is what evaluate has.

    Raises ValueError if the text has too few tokens behind those that evaluate reads, or the exam's file questions.
    """
    if settings.exam is None:
        return _text_scorer(tokenizer, settings.perplexity[0], settings.batch_size, part)
    num_judging = settings.exam.num_questions
    num_choosing = max(1, round(num_judging * part / (1 - part)))
    together, file = settings.exam.model_copy(update={"num_questions": num_judging + num_choosing}), settings.exam.file
    if file is not None and (there := len(read_prompts(file))) < together.num_questions:
        raise ValueError(
            f"search: {file} has {there} questions, of which evaluate.exam asks {num_judging}, and the search needs "
            f"{num_choosing} others; the largest possible num_questions is {math.floor(there * (1 - part))}"
        )
    prompts = exam_prompts(together)[num_judging:]

    def score(model: nn.Module) -> tuple[float, float]:
        rows = evaluate_choices(model, tokenizer, prompts, batch_size=settings.batch_size)
        answers = [row for row in rows if row["kind"] == "answer"]
        losses = [-torch.tensor(r["logits"]).double().log_softmax(0)[r["gold"]].item() for r in answers]
        return fmean(row["predicted"] == row["gold"] for row in answers), fmean(losses)

    which: Row = {"seed": together.seed} if file is None else {"file": file}
    return score, {"exam": {**which, "first": num_judging, "num_questions": num_choosing}}


def _text_scorer(tokenizer: Any, text: Perplexity, batch_size: Asked, part: float) -> tuple[Score, Row]:
    ids, name, num_judging = packed_source(tokenizer, text.text), describe(text.text), text.num_tokens
    assert num_judging is not None  # the recipe sees to it
    num_choosing = max(round(num_judging * part / (1 - part)), text.window)
    if len(ids) < num_judging + num_choosing:
        largest = min(math.floor(len(ids) * (1 - part)), len(ids) - text.window)
        raise ValueError(
            f"search: {name!r} has {len(ids)} tokens, of which evaluate.perplexity reads {num_judging}, and the search "
            f"needs {num_choosing} others; the largest possible num_tokens is {max(largest, 0)}"
        )
    own = ids[num_judging : num_judging + num_choosing]
    asked: dict[str, Any] = {"window": text.window, "stride": text.stride, "text": name}
    asked["bos_id"] = separator_of(tokenizer) if text.bos else None

    def score(model: nn.Module) -> tuple[float, float]:
        return 0.0, perplexity(model, own, batch_size=batch_size, **asked)["loss"]

    return score, {"text": {"name": name, "first": num_judging, "num_tokens": num_choosing}}
