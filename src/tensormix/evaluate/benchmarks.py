"""Benchmarks as lm-eval's tasks: from the Hub as lm-eval registers them, or from a local file by a task file of ours.

A local file is jsonl, one question a line: `query`, `choices` (texts), `gold` (from 0), and `subject` for MMLU. Prompts
are lm-eval's own in both cases; the tests compare them. lm-eval is an extra of this package and imported here only.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tensormix.data.files import read_text
from tensormix.evaluate.choices import ChoicePrompt
from tensormix.settings import Benchmark

LETTERED = ("mmlu",)  # answered by one of four letters, so that OE and PE can be taken
FOLDERS = {"mmlu": "mmlu/default", "arc_challenge": "arc"}  # of lm-eval's tasks, where not the benchmark's name
INSTALL = "pip install 'tensormix[eval]'"
Doc = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question: `requests` holds (context, continuation) for each of its choices."""

    id: str
    subject: str
    place: int  # in its subject's set
    requests: tuple[tuple[str, str], ...]
    gold: int
    task: Any  # lm-eval's, which knows how to score it
    doc: Doc


def check_installed() -> None:
    """Raise ValueError, with the command that mends it, if lm-eval is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"evaluate.benchmarks needs lm-eval, which is not installed; install it with: {INSTALL}")


def questions(benchmark: Benchmark) -> tuple[list[Question], int]:
    """The questions that are asked, subject by subject, and how many the benchmark has in all.

    With `num_questions` a random sample without repeats, drawn over all subjects.

    Raises ValueError without lm-eval, for a file or a dataset that cannot be read, an empty set, a line that lacks a
    field, worked examples without a file of them, and more questions than there are.
    """
    check_installed()
    with silent():
        tasks = local_tasks(benchmark) if benchmark.file is not None else _hub_tasks(benchmark)
        sizes = {subject: len(list(task.eval_docs)) for subject, task in tasks.items()}
        places = [(subject, place) for subject, size in sizes.items() for place in range(size)]
        wanted = benchmark.num_questions or len(places)
        if not places or wanted > len(places):
            raise ValueError(
                f"{benchmark.name}: {wanted} questions were asked for, the set has {len(places)}"
                if places
                else f"{benchmark.name}: there are no questions to ask: the set is empty"
            )
        if wanted < len(places):
            chosen = set(Random(f"{benchmark.name}/{benchmark.seed}").sample(range(len(places)), wanted))
            places = [place for index, place in enumerate(places) if index in chosen]
        return [_question(subject, tasks[subject], place) for subject, place in places], sum(sizes.values())


def choice_prompts(benchmark: Benchmark) -> list[ChoicePrompt]:
    """The questions of a lettered benchmark as prompts, for the geometry at the answer.

    Raises ValueError for a benchmark whose answers are not four letters, and as `questions` does.
    """
    if benchmark.name not in LETTERED:
        raise ValueError(
            f"{benchmark.name} has no four letters to choose among, so it has no token before the answer; "
            f"of the benchmarks that has {', '.join(LETTERED)}"
        )
    return [
        ChoicePrompt(id=asked.id, subject=asked.subject, text=asked.requests[0][0], gold=asked.gold)
        for asked in questions(benchmark)[0]
    ]


def _question(subject: str, task: Any, place: int) -> Question:
    doc = task.eval_docs[place]
    context = task.fewshot_context(doc, num_fewshot=task.config.num_fewshot or 0)
    metadata = (task.config.task, place, 1)
    made = task.construct_requests(doc=doc, ctx=context, metadata=metadata)
    requests = tuple((str(one.arguments[0]), str(one.arguments[1])) for one in sorted(made, key=lambda one: one.idx))
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    given = doc.get("id")
    name = f"{subject}/{place}" if given in (None, "", "None") else str(given)
    return Question(id=name, subject=subject, place=place, requests=requests, gold=int(gold), task=task, doc=doc)


def local_tasks(benchmark: Benchmark) -> dict[str, Any]:
    """lm-eval tasks by subject, from a file of the user's and the task file of this package."""
    from datasets import Dataset

    task: Any = importlib.import_module("lm_eval.api.task")  # by name, as lm-eval need not be installed
    docs = read_docs(str(benchmark.file), benchmark.name)
    shown = read_docs(benchmark.examples, benchmark.name) if benchmark.examples else []
    if benchmark.shots and not shown:
        raise ValueError(
            f"{benchmark.name}: {benchmark.shots} worked examples were asked for, but `examples` names no file of them"
        )
    text = resources.files("tensormix.evaluate").joinpath("tasks", f"{benchmark.name}.yaml").read_text("utf-8")
    subjects = list(dict.fromkeys(doc["subject"] for doc in docs)) if benchmark.name in LETTERED else [benchmark.name]
    made = {}
    for subject in subjects:
        own, examples = (
            [doc for doc in part if benchmark.name not in LETTERED or doc["subject"] == subject]
            for part in (docs, shown)
        )
        if len(examples) < benchmark.shots:
            raise ValueError(
                f"{benchmark.name}: {subject} has {len(examples)} worked examples in {benchmark.examples}, "
                f"{benchmark.shots} were asked for"
            )
        config = yaml.safe_load(text)
        config["task"] += f"_{subject}"
        config["num_fewshot"] = benchmark.shots
        parts = {"test": Dataset.from_list(own), "examples": Dataset.from_list(examples or own)}
        config["custom_dataset"] = lambda parts=parts, **_: parts
        made[subject] = _seeded(task.ConfigurableTask(config=config), benchmark.seed)
    return made


def read_docs(path: str, name: str) -> list[Doc]:
    """The questions of a local file. Raises ValueError that names the file and the line."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{name}: there is no file {path}; give a .jsonl with query, choices and gold on each line")
    docs = []
    wanted = {"query": str, "choices": list, "gold": int} | ({"subject": str} if name in LETTERED else {})
    # split("\n"), as questions hold other characters that splitlines takes for the end of a line
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            doc = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: {path}, line {number} is not valid JSON: {error}") from error
        for key, kind in wanted.items():
            if not isinstance(doc, dict) or not isinstance(doc.get(key), kind):
                raise ValueError(f"{name}: {path}, line {number} needs {key!r} ({kind.__name__})")
        if not 0 <= doc["gold"] < len(doc["choices"]):
            raise ValueError(f"{name}: {path}, line {number}: gold is {doc['gold']} of {len(doc['choices'])} choices")
        if name in LETTERED and len(doc["choices"]) != 4:
            raise ValueError(
                f"{name}: {path}, line {number} has {len(doc['choices'])} choices; OE and PE need exactly four, "
                "named A to D"
            )
        docs.append({"id": str(doc.get("id", "")), **{key: doc[key] for key in wanted}})
    return docs


def _hub_tasks(benchmark: Benchmark) -> dict[str, Any]:
    """lm-eval's registered tasks by subject; the datasets come from the Hub or its cache."""
    registry: Any = importlib.import_module("lm_eval.tasks")
    try:
        # one folder and not all of its thousands of files, which would take most of a minute to index
        folder = Path(registry.__file__).parent / FOLDERS.get(benchmark.name, benchmark.name)
        found = registry.TaskManager(include_path=str(folder), include_defaults=False).load(benchmark.name)["tasks"]
    except Exception as error:  # the Hub client raises a dozen unrelated types; each means that nothing could be read
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{benchmark.name}: lm-eval cannot read its dataset from the Hub or the cache: {reason}; "
            "offline give `file`, a .jsonl with query, choices and gold"
        ) from error
    tasks = {}
    for name, task in found.items():
        task.set_config(key="num_fewshot", value=benchmark.shots)
        tasks[name.removeprefix(f"{benchmark.name}_")] = _seeded(task, benchmark.seed)
    return tasks


def _seeded(task: Any, seed: int) -> Any:
    task.set_fewshot_seed(seed=seed)
    return task


@contextmanager
def silent() -> Iterator[None]:
    """lm-eval without its log; what concerns the user is said by us."""
    import logging
    import warnings

    logger = logging.getLogger("lm_eval")
    level, before = logger.level, logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logger.setLevel(level)
