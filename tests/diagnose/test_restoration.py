from __future__ import annotations

import itertools

import pytest
import torch
from chain import Chain, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.diagnose.restoration import Restoration, inliers, input_sizes, restoring_ranks
from tensormix.sites import find_sites
from zoo import make, token_ids


def test_entries_that_are_singular_values_come_back_at_their_own_rank() -> None:
    """A permuted diagonal: the k-th largest entry is the k-th singular value, and zeros are right from the start."""
    values = torch.tensor([9.0, -7.0, 5.0, 3.0, -1.0], dtype=torch.float64)
    columns = torch.tensor([3, 0, 4, 1, 2])
    weight = torch.zeros(5, 6, dtype=torch.float64)
    weight[torch.arange(5), columns] = values
    places = torch.stack([torch.arange(5), columns], dim=1)
    assert restoring_ranks(weight, places, 0.01).tolist() == [1, 2, 3, 4, 5]
    assert restoring_ranks(weight, torch.tensor([[0, 0], [4, 5]]), 0.01).tolist() == [1, 1]
    assert restoring_ranks(weight, places[:1], 1.5).tolist() == [1]  # everything is near enough


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 9), st.integers(2, 9), st.floats(1e-3, 0.5), st.integers(0, 99))
def test_from_the_rank_on_and_no_earlier(rows: int, columns: int, tolerance: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    found = restoring_ranks(weight, places, tolerance)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    unit = torch.maximum(weight.abs(), weight.square().mean().sqrt())
    right = [((u[:, :r] * s[:r] @ vh[:r] - weight).abs() <= tolerance * unit).flatten() for r in range(1, len(s) + 1)]
    for index, rank in enumerate(found.tolist()):
        assert all(bool(right[r - 1][index]) for r in range(rank, len(s) + 1))
        assert rank == 1 or not bool(right[rank - 2][index])


def test_rows_with_a_super_weight() -> None:
    model = make("llama")
    name = "model.layers.2.mlp.down_proj"
    with torch.no_grad():
        model.get_parameter(f"{name}.weight")[5, 7] = 1e4
    rows = Restoration(num_entries=16, num_ranks=8)(model, [token_ids(2, 12, 1)])
    assert {row["site"] for row in rows} == {name}
    entries = [row for row in rows if row["kind"] == "tracked_entry"]
    assert [(row["row"], row["column"]) for row in entries if row["set"] == "super_weight"] == [(5, 7)]
    curves = {row["set"]: [] for row in rows}
    for row in rows:
        if row["kind"] == "restoration":
            curves[row["set"]].append((row["rank"], row["value"]))
            assert row["tolerance"] == 0.1 and row["num_entries"] == (1 if row["set"] == "super_weight" else 16)
    assert set(curves) == {"inlier", "top_magnitude", "activation_weighted", "super_weight"}
    for curve in curves.values():
        assert [rank for rank, _ in curve] == sorted({rank for rank, _ in curve}) and curve[-1] == (32, 1.0)
        assert all(a[1] <= b[1] for a, b in itertools.pairwise(curve))
    assert curves["super_weight"][0] == (1, 1.0)  # so large that it is the first singular direction


def test_which_entries_are_tracked() -> None:
    model, ids = Chain(3), tokens()
    rows = Restoration(num_entries=3)(model, [ids])
    assert {row["block"] for row in rows} == {1}  # no super weight: the second down projection
    site = find_sites(model)[1]
    with torch.no_grad():
        model.embedding[:, 2] = 100.0  # whatever column 2 holds is multiplied by 100
        model.get_parameter("layers.0.down_proj.weight")[:, 2] = 0.5
    rows = Restoration(site="layers.0.down_proj", num_entries=3)(model, [ids])
    weighted = [row["column"] for row in rows if row["kind"] == "tracked_entry" and row["set"] == "activation_weighted"]
    assert weighted == [2, 2, 2]
    inputs = model.embedding[ids].flatten(0, 1)
    first = next(site for site in find_sites(model) if site.name == "layers.0.down_proj")
    expected = inputs.double().square().mean(0).sqrt()
    torch.testing.assert_close(input_sizes(model, first, [ids[:1], ids[1:]]), expected)
    assert not site.module._forward_pre_hooks


def test_inliers_are_no_outliers() -> None:
    weight = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    weight[::2] *= 1e3
    places = inliers(weight, 50, seed=0)
    limit = 3 * weight.square().mean().sqrt()
    assert len(places.unique(dim=0)) == 50 and bool((weight[places[:, 0], places[:, 1]].abs() <= limit).all())
    assert not torch.equal(places, inliers(weight, 50, seed=1))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"no dense linear layer 'down'; they look like layers\.0\.down_proj"):
        Restoration(site="down")(Chain(1), [tokens()])
    with pytest.raises(ValueError, match="restoration: it needs batches of tokens"):
        Restoration()(Chain(1), [])
