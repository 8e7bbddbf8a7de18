"""Keys change with everything that a result depends on, the content of named files and the code included."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tensormix
from tensormix import version
from tensormix.recipe import Recipe
from tensormix.run import allocation_key, keys, run_recipe, stage_keys, stage_rows

QUESTION = {"text": "What is it?\nA. a\nB. b\nC. c\nD. d\nAnswer:", "gold": 1}


def recipe(tiny: Path, folder: Path, **changes: Any) -> Recipe:
    """Every section reads a file of its own."""
    for name in ("calibration", "recover", "perplexity", "diagnose"):
        (folder / f"{name}.txt").write_text(f"{name} is what this text is about, and nothing else. " * 40)
    (folder / "exam.jsonl").write_text(f"{json.dumps(QUESTION)}\n" * 4)
    (folder / "piqa.jsonl").write_text("{}")
    text = {name: {"file": str(folder / f"{name}.txt")} for name in ("calibration", "recover", "perplexity")}
    data = {
        "model": str(tiny),
        "plan": [{"blocks": "last 1", "method": {"name": "svd_llm", "keep": 0.5}}],
        "calibration": {"text": text["calibration"], "num_windows": 2, "window": 32},
        "recover": {"steps": 2, "batch_size": 1, "window": 32, "text": [text["recover"]]},
        "evaluate": {
            "exam": {"file": str(folder / "exam.jsonl"), "num_questions": 4},
            "perplexity": [{"text": text["perplexity"], "window": 32, "stride": 32}],
            "benchmarks": [{"name": "piqa", "file": str(folder / "piqa.jsonl")}],
        },
        "diagnose": {"num_prompts": 4, "text": {"file": str(folder / "diagnose.txt")}},
    }
    return Recipe.model_validate(data | changes)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("calibration.txt", "compress"),
        ("recover.txt", "recover"),
        ("perplexity.txt", "evaluate"),
        ("exam.jsonl", "evaluate"),
        ("piqa.jsonl", "evaluate"),
        ("diagnose.txt", "diagnose"),
    ],
)
def test_another_content_of_a_named_file_changes_the_key_of_its_stage_and_of_those_that_stand_on_it(
    tiny: Path, tmp_path: Path, name: str, first: str
) -> None:
    asked = recipe(tiny, tmp_path)
    before = stage_keys(asked, None)
    assert stage_keys(asked, None) == before
    (tmp_path / name).write_text((tmp_path / name).read_text().replace("t", "T") + " ")
    changed = {stage for stage, key in stage_keys(asked, None).items() if key != before[stage]}
    after = {"compress": {"recover", "evaluate", "diagnose", "profile"}, "evaluate": {"diagnose"}, "diagnose": set(),
             "recover": {"evaluate", "diagnose", "profile"}}  # fmt: skip
    assert changed == {first} | after[first]


def test_a_budget_is_decided_anew_when_its_text_changes(tiny: Path, tmp_path: Path) -> None:
    plan = [{"blocks": "last 1", "method": {"name": "svd_llm"}}]
    asked = recipe(tiny, tmp_path, plan=plan, budget={"keep": 0.5, "by": "sensitivity"})
    before = allocation_key(asked)
    (tmp_path / "calibration.txt").write_text("another")
    assert allocation_key(asked) != before


def test_an_edited_text_is_measured_again(tiny: Path, tmp_path: Path) -> None:
    evaluate = {"exam": None, "perplexity": [{"text": {"file": str(tmp_path / "perplexity.txt")}, "window": 32,
                                              "stride": 32}]}  # fmt: skip
    asked = recipe(tiny, tmp_path, plan=[], recover=None, evaluate=evaluate, diagnose=None, profile=None)
    before = stage_rows(run_recipe(asked, tmp_path / "run"), "evaluate")
    (tmp_path / "perplexity.txt").write_text("Something else entirely, which the model has not seen either. " * 40)
    assert stage_rows(run_recipe(asked, tmp_path / "run"), "evaluate")[0]["value"] != before[0]["value"]


def test_other_code_is_another_version_but_not_that_of_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tensormix"
    shutil.copytree(Path(tensormix.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "model"))
    monkeypatch.setattr(version, "_PACKAGE", package)

    def changed(name: str) -> bool:
        before = version.code_version.__wrapped__()
        (package / name).write_text((package / name).read_text() + "\n# another line\n")
        return version.code_version.__wrapped__() != before

    assert changed("methods/svd.py") and changed("kernels/mixt/cpu.py") and changed("evaluate/tasks/mmlu.yaml")
    assert not changed("report/page.py") and not changed("cli/tables.py")
    assert version.code_version.__wrapped__().startswith(f"{tensormix.__version__}+")


def test_other_code_changes_every_key(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(tiny, tmp_path)
    before = stage_keys(asked, None)
    monkeypatch.setattr(keys, "code_version", lambda: "0.1.0+other")
    after = stage_keys(asked, None)
    assert before.keys() == after.keys() and not before.items() & after.items()


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "version" not in project["project"] and "version" in project["project"]["dynamic"]
    where = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert where == "tensormix.version.__version__" and tensormix.__version__ == version.__version__
