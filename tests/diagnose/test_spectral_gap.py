from __future__ import annotations

import math

import pytest
import torch
from chain import Chain
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.compression import compress
from tensormix.diagnose.spectral_gap import SpectralGap, spectral_gap
from tensormix.operators import LowRank, MixT
from tensormix.plan import Plan
from tensormix.sites import install
from zoo import make


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 9), st.integers(3, 9), st.integers(0, 99), st.integers(2, 5), st.floats(0, 2))
def test_truncation_is_the_best_and_no_other_matrix_is_better(
    rows: int, columns: int, seed: int, order: int, noise: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    rank = 1 + seed % (min(rows, columns) - 1)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    truncated = u[:, :rank] * s[:rank] @ vh[:rank]
    value, bound = spectral_gap(weight, truncated, rank, order)
    tail = s[rank:]
    assert value == pytest.approx(1) and bound == pytest.approx(math.sqrt(order) * float(tail.norm() / tail[0]))
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    worse, _ = spectral_gap(weight, truncated + noise * left @ vh[:rank], rank, order)  # still of rank k
    assert worse is not None and worse >= 1 - 1e-9


def test_a_weight_of_rank_k_has_no_gap() -> None:
    weight = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4)).double()
    assert spectral_gap(weight, weight * 0.9, 1, 2) == (None, None)


def test_rows_of_a_compressed_model() -> None:
    dense, model = Chain(3), Chain(3)
    with torch.no_grad():
        for name in ("layers.0", "layers.2"):
            values = torch.arange(8, 0, -1.0)
            dense.get_parameter(f"{name}.down_proj.weight").copy_(torch.diag(values))
    wanted = dense.get_parameter("layers.0.down_proj.weight").detach()
    install(model, "layers.0.down_proj", LowRank.from_dense(wanted, rank=2))
    install(model, "layers.2.down_proj", MixT.from_dense(wanted, num_branches=2))
    low, mixt = SpectralGap(order=3)(model, reference=dense)
    assert (low["block"], low["rank"], low["rank_of"], low["order"]) == (0, 2, "the operator", 3)
    assert low["value"] == pytest.approx(1, rel=1e-5)
    assert low["bound"] == pytest.approx(math.sqrt(3 * sum((i / 6) ** 2 for i in range(1, 7))))
    assert (mixt["block"], mixt["rank_of"]) == (2, "equal parameters") and mixt["rank"] == 32 // 16
    assert mixt["value"] < mixt["bound"]


def test_stacks_of_experts_in_their_unfoldings() -> None:
    dense, model = make("qwen3_moe"), make("qwen3_moe")
    rule = {"blocks": "3", "sites": ["gate_up"], "method": {"name": "svd", "keep": 0.2}}
    compress(model, Plan.model_validate([rule]))
    rows = SpectralGap()(model, reference=dense)
    assert rows and all(row["order"] == 3 and row["rank_of"] == "the unfolding" for row in rows)
    assert all(1 <= row["value"] for row in rows)


def test_a_dense_model_has_no_rows_and_a_missing_reference_is_named() -> None:
    assert SpectralGap()(Chain(2), reference=Chain(2)) == []
    with pytest.raises(ValueError, match="spectral_gap: it needs the dense model as reference"):
        SpectralGap()(Chain(2))
