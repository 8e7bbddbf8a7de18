"""The study of recovery: its text is cut apart, its rival has the same size, its page says what the rows say."""

import json
from pathlib import Path

import page as page_maker
import pytest
import study
import text
import variants
import yaml

from tensormix.demo import sweep_file
from tensormix.models import skeleton
from tensormix.plan import Plan

STUDY = Path(__file__).parent
DATA = STUDY.parents[2] / "shared" / "data"


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data, which a plain clone does not have")
def test_what_is_held_out_is_in_nothing_that_is_learned_from():
    parts = text.parts(DATA)
    held_out = {text for name in ("in_domain", "held_out", "stories_held_out") for text in parts[name]}
    assert len(parts["held_out"]) == 40 and len(parts["stories_held_out"]) == 100
    assert not held_out & set(parts["pretraining"])
    assert set(parts["recovery"]) < set(parts["pretraining"])
    c4 = set(parts["pretraining"]) - set(parts["recovery"])
    assert len(c4) == 260  # recovery never reads the corpus of the held-out text


@pytest.mark.parametrize("name", ["svd_llm", "narrow", "flat_llm"])
def test_the_rival_stores_what_mixt_stores(name):
    model = skeleton(sweep_file().parent / "model")
    ours = variants.stored(model, variants.plan_of(variants.MIXT, "last 1", 4))
    rival = {"method": {"name": name, "keep": "KEEP"}}
    keep = variants.equal_keep(model, "last 1", 4, rival)
    theirs = variants.stored(model, variants.plan_of(rival, "last 1", 4, keep))
    assert abs(theirs / ours - 1) < 0.1  # ranks, neurons and channels are whole numbers, here from 2 on


def test_a_variant_of_several_rules_stores_what_mixt_stores_and_multiplies_what_it_says():
    model = skeleton(sweep_file().parent / "model")
    mixtures = {"sites": ["v", "o"], "method": {"name": "mixt"}}
    both = {"rules": [mixtures, {"method": {"name": "svd_llm", "keep": "KEEP"}}]}
    keep = variants.equal_keep(model, "last 1", 3, both)
    plan = variants.plan_of(both, "last 1", 3, keep)
    assert [rule.method.name for rule in plan.root] == ["mixt", "svd_llm"]
    assert (
        abs(variants.stored(model, plan) / variants.stored(model, variants.plan_of(variants.MIXT, "last 1", 3)) - 1)
        < 0.05
    )
    wide = variants.plan_of({"method": {"name": "svd_llm", "keep": "MACS"}}, "last 1", 3)
    mixt = variants.plan_of(variants.MIXT, "last 1", 3).root[0].method
    for shape in ((128, 128), (512, 128)):
        multiplied = mixt.empty(*shape).macs_per_token
        assert abs(wide.root[0].method.empty(*shape).macs_per_token / multiplied - 1) < 0.02


def test_a_variant_that_cannot_store_as_much_is_refused():
    model = skeleton(sweep_file().parent / "model")
    few = {"rules": [{"sites": ["k"], "method": {"name": "svd_llm", "keep": "KEEP"}}]}
    with pytest.raises(
        ValueError, match=r"no KEEP stores about the \d+ numbers of MixT; the nearest, 0\.\d+, misses by"
    ):
        variants.equal_keep(model, "last 1", 2, few)


def test_blocks_one_after_another_take_all_steps_together():
    model = skeleton(sweep_file().parent / "model")
    labels = {"depth": 3, "steps": 200}
    assert study.shares(model, {"in_steps": True}, labels) == [("11", 66), ("10", 66), ("9", 68)]
    assert study.shares(model, {}, labels) == [("last 3", 200)]


def test_every_row_that_is_asked_for_can_be_understood():
    settings = yaml.safe_load((STUDY / "study.yaml").read_text())
    for labels in study.asked(settings):
        assert tuple(labels) == study.LABELS
        assert labels["model"] in settings["models"] and labels["variant"] in settings["variants"]
    for variant in settings["variants"].values():
        assert isinstance(variants.plan_of(variant, "last 2", 3, 0.1), Plan)


def test_every_row_that_was_measured_is_asked_for_by_the_recipe_and_is_there_once():
    settings = yaml.safe_load((STUDY / "study.yaml").read_text())
    asked = {tuple(labels.values()) for labels in study.asked(settings)}
    measured = [json.loads(line) for line in (STUDY / "results.jsonl").read_text().splitlines()]
    found = [tuple(row[name] for name in study.LABELS) for row in measured]
    assert set(found) <= asked
    assert len(set(found)) == len(found)


def row(variant, seed, after, steps=10):
    numbers = {"before": {"in_domain": 90.0}, "after": {"in_domain": after}, "dense": {"in_domain": 2.0}}
    labels = {"model": "m", "variant": variant, "depth": 3, "steps": steps, "seed": seed, "learning_rate": 1e-3}
    return labels | numbers | {"stored": 1234, "parameters": 5678}


def test_the_page_has_the_mean_and_the_spread_of_the_rows_and_their_order():
    rows = [row("worse", 0, 8.0), row("better", 0, 4.0), row("better", 1, 6.0), row("better", 0, 99.0, steps=20)]
    old = "Before.\n<!-- rows: m 3 10 -->\nold\n<!-- end -->\nBetween.\n<!-- rows: m 3 40 -->\n<!-- end -->\n"
    page, plots = page_maker.fill(old, rows)
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert lines[2] == "| better | 2 | 1,234 | 5,678 | 90.00 ± 0.00 | 5.00 ± 1.41 |"
    assert lines[3] == "| worse | 1 | 1,234 | 5,678 | 90.00 | 8.00 |"
    assert lines[4] == "| dense model |  |  |  |  | 2.00 |"
    assert "old" not in page and "Not run." in page
    assert page_maker.fill(page, rows) == (page, plots)
    (drawing,) = plots.values()
    assert drawing.count("times the dense model's perplexity</title>") == 3
    assert "better, in-domain: 3.000 times" in drawing


def test_a_named_table_has_its_variants_alone_and_every_variant_is_in_one():
    rows = [row(variant, 0, 8.0) for variant in ("narrow, kl", "aware, kl", "matched, kl")]
    page, plots = page_maker.fill("<!-- rows: m 3 10 mixt -->\n<!-- end -->\n", rows)
    named = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")][2:-1]
    assert named == ["| aware, kl", "| matched, kl"] and plots == {}
    recipe = page_maker.recipe()
    assert {name for names in recipe["tables"].values() for name in names} == set(recipe["variants"])


def test_a_table_by_a_label_has_the_variants_that_were_measured_at_several_of_its_values():
    rows = [row("a", 0, 8.0), row("a", 0, 5.0, steps=20), row("b", 0, 9.0), row("b", 0, 4.0, steps=20)]
    rows += [row("b", 1, 5.0, steps=20), row("once", 0, 1.0)]
    page, _ = page_maker.fill("<!-- by steps: m depth=3 -->\nold\n<!-- end -->\n", rows)
    assert [line for line in page.splitlines() if line.startswith("| ")] == [
        "| start and operator, loss | 10 steps | 20 steps |",
        "| --- | --- | --- |",
        "| b | 9.00 | 4.50 ± 0.71 |",
        "| a | 8.00 | 5.00 |",
    ]
    assert "old" not in page and "Not run." in page_maker.by_label(rows, "steps", "m", "depth=7")


def test_a_table_says_at_which_rate_a_variant_ends_lowest():
    rows = [row("a", 0, value) | {"learning_rate": rate} for value, rate in ((8.0, 1e-3), (6.0, 2e-3), (7.0, 4e-3))]
    rows += [row("a", 0, 5.0, steps=20) | {"learning_rate": 4e-3}]
    text = page_maker.by_label(rows, "steps", "m", "depth=3 learning_rate=best")
    assert "| a | 6.00 (at 0.002) | 5.00 (at 0.004) |" in text.splitlines()
    rates = page_maker.by_label(rows, "learning_rate", "m", "depth=3 steps=10")
    assert rates.splitlines()[0] == "| start and operator, loss | 0.001 | 0.002 | 0.004 |"
    assert rates.splitlines()[2] == "| a | 8.00 | 6.00 | 7.00 |"


def test_of_exams_the_best_rate_is_the_one_with_most_right():
    def asked(right, rate, steps):
        return row("a", 0, 0.0, steps=steps) | {"after": {"exam": right}, "learning_rate": rate}

    rows = [asked(0.25, 1e-3, 10), asked(0.5, 2e-3, 10), asked(0.75, 1e-3, 20)]
    text = page_maker.by_label(rows, "steps", "m", "depth=3 learning_rate=best")
    assert text.splitlines()[2] == "| a | 0.500 (at 0.002) | 0.750 (at 0.001) |"


def test_the_main_tables_leave_out_what_was_run_at_another_batch_size_or_rate():
    own = page_maker.own_settings()["stories260k"]
    usual = row("a", 0, 8.0) | own | {"model": "stories260k"}
    others = [usual | {"batch_size": 2}, usual | {"learning_rate": own["learning_rate"] / 2}]
    assert page_maker.select([usual, *others], "stories260k", depth=3, steps=10) == [usual]
    assert len(page_maker.select([usual, *others], "stories260k", batch_size=None, learning_rate=None)) == 3


def test_speeds_are_the_last_that_were_measured():
    def timed(name, tokens, speedup):
        return {"structure": name, "tokens": tokens, "speedup": speedup, "numbers": 1000, "macs_per_token": 2000}

    rows = [timed("dense", 1, 1.0), timed("x", 1, 9.0), timed("x", 1, 3.25), timed("dense", 8, 1.0), timed("x", 8, 2.0)]
    page = page_maker.speed("<!-- speed -->\n<!-- end -->\n", rows)
    assert "| x | 1,000 | 2,000 | 3.25 | 2.00 |" in page.splitlines()
    assert "| layers of a block | numbers | MACs per token | 1 tokens | 8 tokens |" in page.splitlines()


def test_the_page_in_the_docs_is_the_one_of_the_rows():
    rows = page_maker.read(STUDY / "results.jsonl")
    page = (STUDY.parents[1] / "docs" / "quality.md").read_text()
    again, plots = page_maker.fill(page, rows)
    measured = page_maker.read(STUDY.parents[1] / "benchmarks" / "results" / "structures.jsonl")
    assert page_maker.speed(again, measured) == page
    for name, drawing in plots.items():
        assert (STUDY.parents[1] / "docs" / name).read_text() == drawing


def test_every_row_carries_where_it_was_measured_and_how_much_it_read():
    for line in (STUDY / "results.jsonl").read_text().splitlines():
        measured = json.loads(line)
        assert measured["environment"]["versions"]["torch"]
        window = 160 if measured["model"] == "embedded" else 256
        assert measured["tokens"] == measured["steps"] * measured["batch_size"] * window
