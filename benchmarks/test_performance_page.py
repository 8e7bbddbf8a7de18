"""docs/performance.md is what its script makes of the measured rows, and says what was missed and what is not there."""

from __future__ import annotations

import json

import performance_page as script


def test_the_page_is_made_of_the_rows():
    rows = script.newest(script.ROWS.read_text(encoding="utf-8").splitlines())
    assert script.PAGE.read_text(encoding="utf-8") == script.page(rows)


def test_a_newer_row_replaces_an_older_one_and_a_missed_target_is_told():
    lines = script.ROWS.read_text(encoding="utf-8").splitlines()
    row = next(
        row
        for row in map(json.loads, lines)
        if row["kind"] == "layer" and row["layer"] == "mixt" and (row["pass"], row["tokens"]) == ("forward", 128)
    )
    fast, slow = (json.dumps({**row, "speedup": speedup}) for speedup in (1.9, 1.7))
    newest = script.newest([*lines, fast, slow])
    assert len(newest) == len(script.newest(lines))
    for newer, verdict in ((fast, "| 1.900 | met |"), (slow, "| 1.700 | **missed** |")):
        assert verdict in script.page(script.newest([*lines, newer]))


def test_what_was_not_measured_is_named():
    lines = script.ROWS.read_text(encoding="utf-8").splitlines()
    left = [line for line in lines if (row := json.loads(line))["kind"] != "layer" or row["in_features"] != 11008]
    page = script.page(script.newest(left))
    assert "LLaMA-2-7B 11008 -> 4096, forward, at 1, 8, 128, 1024, 4096 tokens" in page


def test_a_profile_adds_up_to_the_whole_time():
    row = {"in_features": 4, "out_features": 6, "tokens": 128, "pass": "forward", "median_ms": 2.0, "of_roofline": 0.6}
    row["shares"] = {"aten::baddbmm": 0.5, "aten::addmm": 0.25, "aten::copy_": 0.1, "tensormix::mixt": 0.05}
    assert script.profile([row]) == (
        "* 4 -> 6, 128 tokens, forward: 2.00 ms, 60 % of the roofline. matrix products 75 %, moving numbers between "
        "layouts 10 %, Python and dispatch 15 %; the products alone run at 80 % of the best rate\n"
    )


def test_memory_says_which_is_higher():
    case = {"kind": "memory", "in_features": 4, "out_features": 6, "pass": "forward", "tokens": 128}
    rows = [
        {**case, "layer": name, "peak_bytes": size * 2**20, "weight_bytes": 2**20}
        for name, size in (("dense", 3), ("mixt", 4))
    ]
    rows[0]["weight_bytes"] = 5 * 2**20
    text = script.memory(rows, script.table)
    assert "| 3.0 | 4.0 | higher | 5.0 | 1.0 |" in text
    assert "MixT takes at most 1.0 MiB more; its weights take at least 4.0 MiB less." in text
