"""Questions in the columns of the Hub and, the same ones, in those of a local file. For tests only."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install 'tensormix[eval]')"
)
SUBJECTS = ("us_foreign_policy", "anatomy")
WORDS = ["a 'quoted' one", 'and "another"', "  spaces  around ", "x_y", "naïve – dash", "100 %", "{braces}", "last."]


def mmlu(num: int, first: int = 0) -> list[dict[str, Any]]:
    """Local columns; subjects in turn."""
    return [
        {
            "id": f"q{index}",
            "subject": SUBJECTS[index % 2],
            "query": f" Which is {WORDS[index % 8]}?\nChoose {index}. ",
            "choices": [WORDS[(index + shift) % 8] for shift in range(4)],
            "gold": index % 4,
        }
        for index in range(first, first + num)
    ]


def write(path: Path, docs: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs), encoding="utf-8")
    return str(path)


def official(folder: str, docs: list[dict[str, Any]], **config: Any) -> Any:
    """lm-eval's own task with these documents (columns of the Hub) in every split."""
    import lm_eval
    from datasets import Dataset

    loaded = import_module("lm_eval.tasks._yaml_loader").load_yaml(Path(lm_eval.__file__).parent / "tasks" / folder)
    parts = dict.fromkeys(("train", "validation", "test", "dev"), Dataset.from_list(docs))
    loaded = {key: value for key, value in loaded.items() if key not in ("dataset_path", "dataset_name", "tag")}
    config = {**loaded, "custom_dataset": lambda **_: parts, **config}
    return import_module("lm_eval.api.task").ConfigurableTask(config=config)


def requests(task: Any, place: int) -> list[tuple[str, str]]:
    """(context, continuation) of each choice of one question, as lm-eval makes them."""
    doc = task.eval_docs[place]
    context = task.fewshot_context(doc, num_fewshot=task.config.num_fewshot or 0)
    made = task.construct_requests(doc=doc, ctx=context, metadata=("t", place, 1))
    return [tuple(one.arguments) for one in sorted(made, key=lambda one: one.idx)]
