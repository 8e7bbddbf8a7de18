"""The boundary with few recoveries: bisection through real cells, warm starts, and recoveries that end early."""

import math

import pytest

from tensormix.diagnose.verdict import Verdict
from tensormix.recipe import Sweep
from tensormix.run import run_recipe, stage_rows
from tensormix.storage.files import read_json
from tensormix.sweep.depths import run_sweep


def sweep(tiny, **changes):
    recipe = {
        "model": str(tiny),
        "evaluate": {"exam": {"num_questions": 16, "shots": 1}},
        "diagnose": None,
        "profile": None,
    }
    return Sweep.model_validate({"recipe": recipe | changes.pop("recipe", {}), "vary": {"num_branches": [2]}} | changes)


def test_bisection_recovers_few_depths_and_finds_the_planted_boundary(tiny, tmp_path, monkeypatch):
    """Accuracy is planted (0.9 up to depth 10 of 16); which cells are asked for is the search's own doing."""
    import tensormix.sweep.depths as module
    from tensormix.storage.files import write_json

    made = []

    def planted(recipe, folder, **_options):
        made.append(folder.name)
        depth = 0 if folder.name == "dense" else int(folder.name.split("-")[1])
        accuracy = 0.9 if depth <= 10 else 0.25
        row = {"kind": "accuracy", "subject": "all", "value": accuracy, "num_questions": 400}
        write_json(folder / "evaluate.json", {"rows": [row]})

    monkeypatch.setattr(module, "run_recipe", planted)
    monkeypatch.setattr(module, "blocks", lambda model: range(16))
    run_sweep(sweep(tiny, search="bisect"), tmp_path)
    content = read_json(tmp_path / "sweep.json")
    (boundary,) = (row for row in content["boundary"] if row["kind"] == "boundary")
    assert boundary["value"] == 11
    assert len(made) == len(set(made)) <= math.log2(16) + 4
    assert [row["cell"] for row in content["cells"]][1:] == sorted(set(made) - {"dense"})


def test_bisection_runs_real_cells_of_every_series_and_does_nothing_twice(tiny, tmp_path):
    wanted = sweep(tiny, search="bisect", baselines={"methods": ["zero"]})
    run_sweep(wanted, tmp_path)
    cells = [row["cell"] for row in read_json(tmp_path / "sweep.json")["cells"]]
    assert {"dense", "last-04-mixt2", "last-04-zero"} <= set(cells)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/evaluate.json")}
    assert len(before) == len(cells)
    run_sweep(wanted, tmp_path)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/evaluate.json")}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"depths": [1, 2]}, "bisect chooses the depths by itself: leave out depths"),
        ({"directions": {"first": {"depths": [1]}}}, "bisect chooses the depths by itself"),
        ({"baselines": {"depths": [1]}}, "bisect chooses the depths by itself"),
        ({"warm_start": True}, r"none can go on from the one before \(warm_start\)"),
        ({"recipe": {"evaluate": {"exam": None}}}, r"compares accuracies, so it needs evaluate\.exam"),
    ],
)
def test_what_bisection_cannot_do_is_refused(tiny, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        sweep(tiny, search="bisect", **changes)


def test_with_warm_starts_a_depth_compresses_one_block_more_of_the_recovered_one_before(tiny, tmp_path):
    recover = {"steps": 2, "batch_size": 2, "window": 16, "text": [{"exam": True}], "loss": "kl"}
    wanted = sweep(tiny, depths=[1, 2], warm_start=True, recipe={"recover": recover})
    run_sweep(wanted, tmp_path)
    first, second = tmp_path / "last-01-mixt2", tmp_path / "last-02-mixt2"
    assert {row["block"] for row in stage_rows(first, "compress")} == {3}
    assert {row["block"] for row in stage_rows(second, "compress")} == {2}
    assert read_json(second / "recipe.json")["start"] == str(first / "recovered")
    operators = read_json(second / "recovered" / "config.json")["quantization_config"]["operators"]
    assert {name.split(".")[2] for name in operators} == {"2", "3"}
    told = []
    run_sweep(wanted, tmp_path, progress=lambda *args: told.append(args))
    assert told == []


# ---- early stopping


def verdict(answers, num_steps=100):
    answers = iter(answers)
    return Verdict(lambda _model: next(answers), threshold=0.6, num_steps=num_steps)


def test_a_recovery_that_is_clearly_above_ends_at_once():
    judge = verdict([(0.62, 0.57, 0.67), (0.7, 0.65, 0.75)])
    assert [judge(None, 10), judge(None, 20)] == [False, True]
    assert judge.rows[-1] == {"kind": "early_stop", "step": 20, "accuracy": 0.7, "outcome": "above"}


def test_one_that_is_below_and_gains_nothing_ends_in_the_second_half_only():
    low = (0.25, 0.2, 0.3)
    judge = verdict([low, low, low])
    assert [judge(None, step) for step in (20, 40, 60)] == [False, False, True]
    assert judge.rows[-1]["outcome"] == "below"


def test_one_that_still_gains_goes_on():
    judge = verdict([(0.25, 0.2, 0.3), (0.4, 0.35, 0.45), (0.5, 0.45, 0.55)])
    assert not any(judge(None, step) for step in (40, 60, 80))


def test_the_end_of_the_recovery_is_no_early_stop():
    assert not verdict([])(None, 100)


def test_a_run_ends_early_and_says_so(tiny, tmp_path):
    recover = {"steps": 40, "batch_size": 2, "window": 16, "text": [{"exam": True}], "save_every": 2}
    early = recover | {"early_stop": {"threshold": 0.01, "num_questions": 16}}
    recipe = sweep(tiny, recipe={"recover": early}).recipe
    rows = stage_rows(run_recipe(recipe, tmp_path / "run"), "recover")
    assert [row["step"] for row in rows if row["kind"] == "loss"] == [1, 2]
    assert rows[-1]["outcome"] == "above"


def test_early_stopping_alone_needs_a_threshold(tiny, tmp_path):
    recover = {"steps": 4, "text": [{"exam": True}], "early_stop": {}}
    with pytest.raises(ValueError, match="early_stop needs a threshold of accuracy"):
        run_recipe(sweep(tiny, recipe={"recover": recover}).recipe, tmp_path / "run")
