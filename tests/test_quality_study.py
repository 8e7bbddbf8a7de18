"""The study of recovery: its text is cut apart, its rival has the same size, its page says what the rows say."""

import json
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml

from tensormix.demo import sweep_file
from tensormix.models import skeleton
from tensormix.plan import Plan

STUDY = Path(__file__).parents[1] / "studies" / "quality"
DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(STUDY))
    try:
        import page
        import study
        import text

        yield {"page": page, "study": study, "text": text}
    finally:
        sys.path.remove(str(STUDY))
        for name in ("page", "study", "text"):
            sys.modules.pop(name, None)


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data, which a plain clone does not have")
def test_what_is_held_out_is_in_nothing_that_is_learned_from(study):
    parts = study["text"].parts(DATA)
    held_out = {text for name in ("in_domain", "held_out", "stories_held_out") for text in parts[name]}
    assert len(parts["held_out"]) == 40 and len(parts["stories_held_out"]) == 100
    assert not held_out & set(parts["pretraining"])
    assert set(parts["recovery"]) < set(parts["pretraining"])
    c4 = set(parts["pretraining"]) - set(parts["recovery"])
    assert len(c4) == 260  # recovery never reads the corpus of the held-out text


def test_the_rival_stores_what_mixt_stores(study):
    model = skeleton(sweep_file().parent / "model")
    plan = study["study"].plan_of
    ours = study["study"].stored(model, plan({"name": "mixt"}, 1, 4))
    for name in ("svd_llm", "narrow", "flat_llm"):
        keep = study["study"].equal_keep(model, 1, 4, {"name": name})
        theirs = study["study"].stored(model, plan({"name": name, "keep": keep}, 1, 4))
        assert abs(theirs / ours - 1) < 0.1  # ranks, neurons and channels are whole numbers, here from 2 on


def test_every_row_that_is_asked_for_can_be_understood(study):
    settings = yaml.safe_load((STUDY / "study.yaml").read_text())
    for round_ in settings["rounds"]:
        assert round_["model"] in settings["models"]
        assert set(round_["variants"]) <= set(settings["variants"])
    for variant in settings["variants"].values():
        method = dict(variant["method"])
        if method.get("keep") == "KEEP":
            method["keep"] = 0.1
        assert isinstance(study["study"].plan_of(method, 2, 3), Plan)


def test_every_row_that_was_measured_is_asked_for_by_the_recipe(study):
    settings = yaml.safe_load((STUDY / "study.yaml").read_text())
    labels = study["study"].LABELS
    asked = {
        (round_["model"], variant, depth, steps, seed)
        for round_ in settings["rounds"]
        for depth, steps, seed, variant in product(*(round_[key] for key in ("depths", "steps", "seeds", "variants")))
    }
    assert labels == ("model", "variant", "depth", "steps", "seed")
    measured = [json.loads(line) for line in (STUDY / "results.jsonl").read_text().splitlines()]
    assert {tuple(row[name] for name in labels) for row in measured} <= asked


def row(variant, seed, after, steps=10):
    numbers = {"before": {"in_domain": 90.0}, "after": {"in_domain": after}, "dense": {"in_domain": 2.0}}
    labels = {"model": "m", "variant": variant, "depth": 3, "steps": steps, "seed": seed}
    return labels | numbers | {"stored": 1234, "parameters": 5678}


def test_the_page_has_the_mean_and_the_spread_of_the_rows_and_their_order(study):
    rows = [row("worse", 0, 8.0), row("better", 0, 4.0), row("better", 1, 6.0), row("better", 0, 99.0, steps=20)]
    old = "Before.\n<!-- rows: m 3 10 -->\nold\n<!-- end -->\nBetween.\n<!-- rows: m 3 40 -->\n<!-- end -->\n"
    page, plots = study["page"].fill(old, rows)
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert lines[2] == "| better | 2 | 1,234 | 5,678 | 90.00 ± 0.00 | 5.00 ± 1.41 |"
    assert lines[3] == "| worse | 1 | 1,234 | 5,678 | 90.00 | 8.00 |"
    assert lines[4] == "| dense model |  |  |  |  | 2.00 |"
    assert "old" not in page and "Not run." in page
    assert study["page"].fill(page, rows) == (page, plots)
    (drawing,) = plots.values()
    assert drawing.count("times the dense model's perplexity</title>") == 3
    assert "better, in-domain: 3.000 times" in drawing


def test_lengths_are_those_of_variants_that_were_recovered_for_several(study):
    rows = [row("a", 0, 8.0), row("a", 0, 5.0, steps=20), row("b", 0, 9.0), row("b", 0, 4.0, steps=20)]
    rows += [row("b", 1, 5.0, steps=20), row("once", 0, 1.0)]
    page, _ = study["page"].fill("<!-- lengths: m 3 -->\nold\n<!-- end -->\n", rows)
    assert [line for line in page.splitlines() if line.startswith("| ")] == [
        "| start and operator, loss | 10 steps | 20 steps |",
        "| --- | --- | --- |",
        "| b | 9.00 | 4.50 ± 0.71 |",
        "| a | 8.00 | 5.00 |",
    ]
    assert "old" not in page and "Not run." in study["page"].lengths(rows, "m", 7)


def test_speeds_are_the_last_that_were_measured(study):
    def timed(name, tokens, speedup):
        return {"structure": name, "tokens": tokens, "speedup": speedup, "numbers": 1000, "macs_per_token": 2000}

    rows = [timed("dense", 1, 1.0), timed("x", 1, 9.0), timed("x", 1, 3.25), timed("dense", 8, 1.0), timed("x", 8, 2.0)]
    page = study["page"].speed("<!-- speed -->\n<!-- end -->\n", rows)
    assert "| x | 1,000 | 2,000 | 3.25 | 2.00 |" in page.splitlines()
    assert "| layers of a block | numbers | MACs per token | 1 tokens | 8 tokens |" in page.splitlines()


def test_the_page_in_the_docs_is_the_one_of_the_rows(study):
    rows = study["page"].read(STUDY / "results.jsonl")
    page = (STUDY.parents[1] / "docs" / "quality.md").read_text()
    again, plots = study["page"].fill(page, rows)
    measured = study["page"].read(STUDY.parents[1] / "benchmarks" / "results" / "structures.jsonl")
    assert study["page"].speed(again, measured) == page
    for name, drawing in plots.items():
        assert (STUDY.parents[1] / "docs" / name).read_text() == drawing


def test_every_row_carries_where_it_was_measured():
    for line in (STUDY / "results.jsonl").read_text().splitlines():
        measured = json.loads(line)
        assert measured["environment"]["versions"]["torch"]
        assert measured["tokens"] == measured["steps"] * 8 * (160 if measured["model"] == "embedded" else 256)
