"""The study of other weights for the same function: its page says what its rows say, its rival has as many numbers."""

from __future__ import annotations

from pathlib import Path

import bases
import pytest
import torch

from tensormix.methods import Mixt
from tensormix.statistics import Gram

STUDY = Path(__file__).parent


def test_the_tables_of_the_page_are_those_of_the_rows():
    page = (STUDY.parents[1] / "docs" / "structures.md").read_text()
    tables = bases.tables(bases.read())
    assert len(tables) >= 2 and all(table in page for table in tables.values())
    assert all("as it is" in table and "all together" in table for table in tables.values())


def test_a_table_has_the_last_row_of_each_rewriting_and_marks_what_is_below_its_rival():
    errors = [dict.fromkeys(bases.ROLES, value) for value in (0.9, 0.5)]
    row = {"model": "m", "num_branches": 3, "weights": "as it is", "error": errors[0], "rival_error": errors[0]}
    newer = {**row, "error": errors[1], "kl": {"mixt": 2.0, "low_rank": 1.0}}
    (table,) = bases.tables([{**row, "kl": None}, newer]).values()
    assert table.count("\n") == 3 and table.count("**0.50** (0.90)") == 7 and "| 2.00 (1.00) |" in table


@torch.no_grad()
def test_the_error_between_dense_bases_is_that_of_the_turned_weight_and_low_rank_does_not_mind():
    torch.manual_seed(0)
    weight, gram = torch.randn(32, 32), Gram(32)
    gram.update(torch.randn(200, 32) * torch.logspace(0, -1, 32))
    method = Mixt(num_branches=2, init="aware")
    alone, rival, operators = bases._fit(weight, gram, method)
    turned, same, _ = bases._fit_between_dense_bases(weight, gram, method)
    assert same == pytest.approx(rival, rel=1e-3) and turned != pytest.approx(alone, rel=1e-3)
    assert operators["low_rank"].num_params >= operators["mixt"].num_params
    left_over = (weight - operators["low_rank"].to_dense()).double()
    found = ((left_over @ gram.mean * left_over).sum() / (weight.double() @ gram.mean * weight).sum()).sqrt()
    assert float(found) == pytest.approx(rival, rel=1e-3)
