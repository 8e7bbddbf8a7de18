"""Accuracy on published benchmarks with lm-eval as the engine: its prompts, its scoring of continuations, its metrics.

Every choice is scored by the log-likelihood of its text after the context; `acc` takes the largest, `acc_norm` the
largest per byte. Where the answers are four letters (MMLU) the four log-likelihoods are kept as `logits`: they differ
from the logits of the four tokens by one constant, so that softmax, OE and PE are the same.

What is finished is kept in a journal, one line a question, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tensormix.evaluate.batches import Asked, BatchSize
from tensormix.evaluate.benchmarks import LETTERED, Question, questions, silent
from tensormix.evaluate.choices import accuracy_rows, answer_tokens
from tensormix.evaluate.forward import quiet
from tensormix.rows import Progress, Row
from tensormix.settings import Benchmark

CHUNK = 8  # batches between two writes of the journal


def ask(
    model: Any,
    tokenizer: Any,
    benchmark: Benchmark,
    *,
    batch_size: Asked | BatchSize,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Rows of kind "accuracy" ("all", then each subject of MMLU) and "answer" (each question), as the exam's are.

    `low` and `high` are the Wilson 95 % interval of `value`, which is `acc`; rows of "all" carry `acc_norm` where the
    benchmark has it, the number of worked examples, the size of the whole set and the batch size that fitted. Questions
    that were left out because they are longer than the context are counted and named in a row of kind "left_out".

    A tokenizer in which a letter is not one token still gives an accuracy, but no `logits`; a row of kind "no_entropy"
    says why.

    Raises ValueError without lm-eval, for what `questions` refuses, for questions longer than the context (unless they
    are to be left out), and for likelihoods that are NaN.
    """
    asked, num_all = questions(benchmark)
    size = BatchSize(batch_size)
    with silent():
        engine = _engine(model, tokenizer)
        asked, notes = _short_enough(engine, asked, benchmark)
    refused = _no_letters(tokenizer, benchmark)
    kept = _Kept(journal, benchmark)
    todo = [item for item in asked if _key(item) not in kept.found]
    with quiet(model), silent():
        for chunk, values in size.each(
            todo, lambda part, n: _likelihoods(engine, part, n), cost=_num_characters, batches=CHUNK
        ):
            for item, likelihoods in zip(chunk, values, strict=True):
                kept.add(_key(item), likelihoods)
            if progress is not None:
                progress(len(kept.found), len(asked))
    keep = "likelihoods" if benchmark.name not in LETTERED or refused else "logits"
    answers = [_answer(item, kept.found[_key(item)], benchmark.name, keep) for item in asked]
    rows = accuracy_rows(answers)[: None if benchmark.name in LETTERED else 1]
    norm = [row["acc_norm"] for row in answers if "acc_norm" in row]
    rows[0] |= {"shots": benchmark.shots, "size": num_all, "batch_size": size.size}
    rows[0] |= {"acc_norm": sum(norm) / len(norm)} if norm else {}
    return rows + notes + refused + answers


def _no_letters(tokenizer: Any, benchmark: Benchmark) -> list[Row]:
    """A row that says why the four letters have no logits of their own; none where they have."""
    if benchmark.name not in LETTERED:
        return []
    try:
        answer_tokens(tokenizer)
    except ValueError as error:
        return [{"kind": "no_entropy", "task": benchmark.name, "reason": str(error)}]
    return []


def macro_row(rows: Sequence[Row]) -> list[Row]:
    """The unweighted mean accuracy of the zero-shot benchmarks as one row (arXiv 2606.03465); none for fewer than 2."""
    found = [
        row
        for row in rows
        if row["kind"] == "accuracy"
        and row.get("shots") == 0
        and row["subject"] == "all"
        and row["task"] not in LETTERED
    ]
    if len(found) < 2:
        return []
    mean = sum(row["value"] for row in found) / len(found)
    return [{"kind": "macro_accuracy", "value": mean, "tasks": [row["task"] for row in found]}]


def macro_drop_row(rows: Sequence[Row], dense: Sequence[Row]) -> list[Row]:
    """How many percentage points the mean accuracy lies below the dense model's, from the evaluate rows of both.

    Raises ValueError if the two means are of different benchmarks.
    """
    own, other = ([row for row in part if row["kind"] == "macro_accuracy"] for part in (rows, dense))
    if not own or not other:
        return []
    if own[0]["tasks"] != other[0]["tasks"]:
        raise ValueError(
            f"macro drop: this model was asked {', '.join(own[0]['tasks'])} and the dense reference "
            f"{', '.join(other[0]['tasks'])}; ask both the same"
        )
    drop = 100 * (other[0]["value"] - own[0]["value"])
    return [{"kind": "macro_drop", "value": drop, "tasks": own[0]["tasks"]}]


def _engine(model: Any, tokenizer: Any) -> Any:
    engine: Any = import_module("lm_eval.models.huggingface")  # by name, as lm-eval need not be installed
    return engine.HFLM(pretrained=model, tokenizer=tokenizer)


def _likelihoods(engine: Any, chunk: Sequence[Question], batch_size: int) -> list[list[float]]:
    """Of each question the log-likelihoods of its choices."""
    instance: Any = import_module("lm_eval.api.instance")
    engine.batch_size_per_gpu = batch_size
    requests = [
        instance.Instance(request_type="loglikelihood", doc=item.doc, arguments=pair, idx=index)
        for item in chunk
        for index, pair in enumerate(item.requests)
    ]
    found = iter(engine.loglikelihood(requests, disable_tqdm=True))
    return [[float(next(found)[0]) for _ in item.requests] for item in chunk]


def _short_enough(engine: Any, asked: list[Question], benchmark: Benchmark) -> tuple[list[Question], list[Row]]:
    """The questions that fit into the context, and a row about the others.

    Raises ValueError that counts and names them, unless they are to be left out.
    """
    limit = engine.max_length
    lengths = [_num_tokens(engine, item, limit) for item in asked]
    long = [(length, item.id) for length, item in zip(lengths, asked, strict=True) if length > limit + 1]
    if not long:
        return asked, []
    tokens, name = max(long)
    said = (
        f"{len(long)} of {len(asked)} questions are longer than the {limit} tokens that the model reads at once; "
        f"the longest is {name!r} with {tokens} tokens"
    )
    if benchmark.too_long == "refuse":
        raise ValueError(f"{benchmark.name}: {said}: ask with fewer shots, or say too_long: leave_out")
    rest = [item for length, item in zip(lengths, asked, strict=True) if length <= limit + 1]
    if not rest:
        raise ValueError(f"{benchmark.name}: {said}, and none is left")
    row = {"kind": "left_out", "task": benchmark.name, "value": len(long), "limit": limit, "longest": tokens}
    return rest, [{**row, "ids": [name for _, name in long]}]


def _num_tokens(engine: Any, item: Question, limit: int) -> int:
    """Tokens of the longest choice with its context; a text of few bytes is not even tokenised."""
    if max(len((context + continuation).encode()) for context, continuation in item.requests) < limit:
        return 0
    return max(sum(map(len, engine._encode_pair(*pair))) for pair in item.requests)


def _answer(item: Question, likelihoods: list[float], task: str, keep: str) -> Row:
    if any(math.isnan(value) for value in likelihoods):
        raise ValueError(f"{task}: the model's likelihoods are NaN for question {item.id!r}")
    scores = item.task.process_results(item.doc, [(value, False) for value in likelihoods])
    row = {
        "kind": "answer",
        "task": task,
        "subject": item.subject,
        "id": item.id,
        "gold": item.gold,
        "predicted": max(range(len(likelihoods)), key=likelihoods.__getitem__),
        keep: likelihoods,
    }
    return row | ({"acc_norm": float(scores["acc_norm"])} if "acc_norm" in scores else {})


def _num_characters(chunk: Sequence[Question]) -> int:
    return sum(len(context) for item in chunk for context, _ in item.requests)


def _key(item: Question) -> str:
    return f"{item.subject}/{item.place}"


class _Kept:
    """The likelihoods of the questions that are answered already, in a file of JSON lines if there is a path."""

    def __init__(self, path: Path | None, benchmark: Benchmark) -> None:
        self.path, self.found = path, dict[str, list[float]]()
        head = benchmark.model_dump_json()
        if path is None:
            return
        if path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")
            if lines[0] == head:
                self.found = dict(json.loads(line) for line in lines[1:-1])  # the last is empty, or cut off by a kill
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in (head, *map(json.dumps, self.found.items()))), encoding="utf-8")

    def add(self, key: str, likelihoods: list[float]) -> None:
        self.found[key] = likelihoods
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, likelihoods]) + "\n")
