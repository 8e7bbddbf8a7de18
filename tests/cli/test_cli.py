"""The command line as a user types it: what it prints, and what it says when something is wrong."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from tensormix.cli import verbs as cli
from tensormix.cli.progress import duration
from tensormix.cli.tables import blocks_text, show_results
from tensormix.cli.verbs import app, listing
from tensormix.methods import METHODS

ROOT = Path(__file__).parents[2]


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def recipe(tiny, tmp_path):
    path = tmp_path / "recipe.yaml"
    data = {
        "model": str(tiny),
        "plan": [{"blocks": "last 2", "method": {"name": "mixt", "num_branches": 3}}],
        "evaluate": {"exam": {"num_questions": 8, "shots": 1}},
        "diagnose": {"num_prompts": 4},
        "profile": {"tokens": [1], "repeats": 2},
    }
    path.write_text(yaml.safe_dump(data))
    return path


def test_check_prints_what_programs_need(recipe):
    result = json.loads(invoke("check", recipe, "--json").stdout)
    assert set(result) == {"dense", "compressed", "sites", "assumed"}
    for side in ("dense", "compressed"):
        assert set(result[side]) == {"parameters", "macs_per_token", "bytes"}
        assert result[side]["bytes"]["bfloat16"] == 2 * result[side]["parameters"]
    assert len(result["sites"]) == 14
    assert result["compressed"]["parameters"] < result["dense"]["parameters"]


def test_check_needs_a_config_only(recipe, tiny, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny / "config.json").read_bytes())
    data = yaml.safe_load(recipe.read_text()) | {"model": "bare"}
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(data))
    assert json.loads(invoke("check", tmp_path / "bare.yaml", "--json").stdout)["sites"]


def test_check_is_readable(recipe):
    text = invoke("check", recipe).stdout
    assert "2 in blocks 2-3" in text
    assert "parameters" in text and "%" in text


def test_run_then_report(recipe, tmp_path):
    folder = tmp_path / "out"
    text = invoke("run", recipe, "--out", folder).stdout
    assert "evaluate:" in text and "Finished. See it with: tensormix report" in text
    values = [
        json.loads((path / "evaluate.json").read_text())["rows"][0]["value"] for path in (folder / "dense", folder)
    ]
    assert ["dense", "compressed"] in [line.split() for line in text.splitlines()]
    said = next(line for line in text.splitlines() if line.startswith("accuracy, exam"))
    assert [float(word) for word in said.split() if word[0].isdigit()] == [round(100 * value, 1) for value in values]
    assert (folder / "profile.json").exists()
    text = invoke("report", folder).stdout
    assert text.strip().endswith("report.html")
    assert "<html" in (folder / "report.html").read_text()


def test_what_was_measured_has_a_line_each_and_a_column_for_each_model():
    def rows(*perplexities):
        found = [{"kind": "perplexity", "text": "a.txt", "value": value} for value in perplexities]
        found += [{"kind": "perplexity", "text": "a.txt", "value": 3.0, "domain": "held_out"}]
        exam = [{"kind": "accuracy", "task": "exam", "subject": name, "value": 0.5} for name in ("all", "addition")]
        return [*found, {"kind": "kl", "text": "a.txt", "value": 0.125}, *exam, {"kind": "answer", "value": 1}]

    console = Console(width=100, record=True, file=io.StringIO())
    show_results(console, {"dense": rows(4.0, 5.0), "compressed": [], "recovered": rows(6.25, 7.0)})
    assert [line.split() for line in console.export_text().splitlines()] == [
        ["dense", "recovered"],
        ["perplexity,", "a.txt", "4", "6.25"],
        ["perplexity,", "a.txt", "(2)", "5", "7"],
        ["perplexity,", "a.txt", "(held-out)", "3", "3"],
        ["KL,", "a.txt", "0.125", "0.125"],
        ["accuracy,", "exam", "50.0", "%", "50.0", "%"],
    ]
    show_results(console, {"dense": []})
    assert console.export_text() == ""


@pytest.mark.parametrize(
    ("asked", "columns"),
    [
        ({"plan": [{}], "recover": {}, "direct": True}, {"dense": 3, "compressed": 2, "recovered": 1}),
        ({"plan": [{}], "recover": {}, "direct": False}, {"dense": 3, "recovered": 1}),
        ({"plan": [{}], "recover": None, "direct": True}, {"dense": 3, "compressed": 1}),
        ({"plan": [], "recover": None, "direct": False}, {"model": 1}),
    ],
)
def test_files_of_stages_that_the_recipe_asks_for_no_more_are_not_shown(tmp_path, asked, columns):
    recipe = {"plan": asked["plan"], "recover": asked["recover"], "evaluate": {"direct": asked["direct"]}}
    files = {"recipe": recipe, "dense/recipe": recipe, "recover": {"rows": []}}
    files |= {name: {"rows": [{"value": n}]} for n, name in enumerate(("evaluate", "direct", "dense/evaluate"), 1)}
    (tmp_path / "dense").mkdir()
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = {name: rows[0]["value"] for name, rows in cli.measured_in(tmp_path).items() if rows}
    assert found == columns


def test_sweep_ends_with_the_name_of_the_page(recipe, tmp_path):
    data = yaml.safe_load(recipe.read_text())
    data["plan"] = [{"method": {"name": "mixt", "num_branches": 3}}]
    sweep = {"recipe": data, "vary": {"num_branches": [3]}, "depths": [1, 2]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    result = invoke("sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "s")
    assert result.stdout.splitlines()[-1].endswith("report.html")
    assert "left" in result.stdout or "estimating" in result.stdout


def test_list_methods_for_programs():
    rows = json.loads(invoke("list", "methods", "--json").stdout)
    assert [row["name"] for row in rows] == list(METHODS)
    assert all({"name", "source", "sites", "needs"} <= set(row) for row in rows)


@pytest.mark.parametrize("what", cli.THINGS)
def test_every_list_has_rows(what):
    assert listing(what)
    assert invoke("list", what).exit_code == 0


def test_an_unknown_list_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"there is no table 'method', did you mean 'methods'\? Known: methods, "):
        listing("method")


def test_mistakes_are_one_sentence_without_a_traceback(tmp_path):
    (tmp_path / "r.yaml").write_text("model: nowhere/such-model\nplan: []\nrecovr: {}\n")
    done = subprocess.run(
        [sys.executable, "-m", "tensormix.cli", "check", str(tmp_path / "r.yaml")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    assert "unknown key 'recovr', did you mean 'recover'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_blocks_are_written_as_ranges():
    assert blocks_text([3, 1, 2, 2, 7]) == "1-3, 7"


def test_durations_read_as_people_say_them():
    assert [duration(s) for s in (7, 65, 3600 * 2 + 300)] == ["7 s", "1 min 05 s", "2 h 05 min"]


@pytest.mark.parametrize("verb", ["run", "sweep"])
def test_a_folder_that_holds_something_else_is_left_alone(recipe, tmp_path, verb):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    settings = tmp_path / "sweep.yaml"
    settings.write_text(
        yaml.safe_dump({"base": recipe.name, "vary": {"num_branches": [3]}, "directions": {"last": {"depths": [1]}}})
    )
    result = invoke(verb, recipe if verb == "run" else settings, "--out", tmp_path / "out")
    assert isinstance(result.exception, ValueError), result.exception
    assert f"holds something else (no {'recipe' if verb == 'run' else 'sweep'}.json)" in str(result.exception)
    assert str(result.exception).endswith("choose another --out, or add --overwrite")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_workers_and_threads_and_overwrite(recipe, tmp_path):
    import torch

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    threads = torch.get_num_threads()
    try:
        words = ["--out", tmp_path / "out", "--workers", "2", "--threads", "1", "--overwrite"]
        assert invoke("run", recipe, *words).exit_code == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "out" / "compressed" / "config.json").exists()
    assert (tmp_path / "out" / "thesis.txt").exists()
    assert invoke("run", recipe, "--out", tmp_path / "out").exit_code == 0  # a run of ours goes on without the flag
