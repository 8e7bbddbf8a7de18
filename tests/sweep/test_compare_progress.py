"""How far a comparison is, from its first moment on; and methods that compete in it."""

import io

import pytest
from rich.console import Console

from tensormix.cli import progress
from tensormix.recipe.comparison import Comparison
from tensormix.rows import STAGES
from tensormix.run import stage_rows
from tensormix.sweep.compare import run_comparison
from tensormix.sweep.depths import shares_of

AUTO = {"name": "auto", "among": [{"name": "svd_llm"}, {"name": "flat_llm"}], "tokens": 16}


def comparison(tiny, **changes):
    recipe = {
        "model": str(tiny),
        "calibration": {"text": {"facts": True}, "num_windows": 2, "window": 32},
        "evaluate": {"exam": None, "perplexity": [{"text": {"facts": True}, "window": 64, "stride": 64}]},
        "diagnose": None,
        "profile": None,
    }
    data = {"recipe": recipe, "methods": {"auto": {"method": AUTO}}, "budgets": [0.6], "of": "parameters"}
    return Comparison.model_validate(data | changes)


def test_it_is_told_before_the_dense_model_runs_and_never_goes_back(tiny, tmp_path):
    told = []
    run_comparison(comparison(tiny, by="sensitivity"), tmp_path, progress=lambda *args: told.append(args))
    assert told[0] == ("dense", 0, 5)
    of_cells = [done / total for name, done, total in told if name != "dense"]
    assert of_cells == sorted(of_cells) and told[-1][1:] == (4, 4)
    rows = stage_rows(tmp_path / "auto-0.6-s0", "allocate")
    assert rows[0]["by"] == "auto" and rows[0]["achieved_keep"] <= 0.6


def test_shares_are_of_the_stages_that_are_asked_for(tiny):
    asked = comparison(tiny)
    shares = shares_of(asked.recipe_of(asked.cells()[0]))
    assert sum(shares.values()) == pytest.approx(1) and set(shares) == set(STAGES)
    assert shares["allocate"] > shares["evaluate"] > 0 == shares["recover"] == shares["diagnose"]


def test_where_nobody_watches_a_line_comes_at_each_cell_and_every_half_minute(monkeypatch):
    seconds = iter([0.0, 1.0, 2.0, 31.5, 40.0, 61.0, 63.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(seconds))
    told = io.StringIO()
    with progress.cell_bars(Console(file=told, force_terminal=False)) as tell:
        for name, done in [("dense", 0.0), ("dense", 0.1), ("dense", 0.5), ("dense", 0.6), ("a", 1.0), ("a", 1.1)]:
            tell(name, done, 2.0)
    lines = told.getvalue().splitlines()
    assert [line.split()[-1] for line in lines] == ["dense", "dense", "a"]
    assert [line.split(" %")[0].strip() for line in lines] == ["0", "25", "50"]
