"""HASSLE-free: what a budget becomes, and what is said where it becomes nothing."""

from __future__ import annotations

from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_inputs import SOLVERS, gram_of, random
from tensormix.methods import HassleFree
from tensormix.operators import Sparse, Sum
from tensormix.operators.sparse import GROUPED, PATTERNS
from tensormix.statistics import Gram


def budgets():
    keep, share = st.floats(0.01, 1), st.floats(0, 0.99)
    rank = st.integers(0, 12)
    grouped = st.sampled_from(sorted(GROUPED))
    return st.one_of(
        st.fixed_dictionaries({"keep": keep, "low_rank_share": share}),
        st.fixed_dictionaries({"keep": keep, "rank": rank}),
        st.fixed_dictionaries({"pattern": grouped, "keep": keep}),
        st.fixed_dictionaries({"pattern": grouped, "rank": rank}),
    )


@settings(deadline=None, max_examples=80)
@given(budgets(), st.integers(1, 20), st.integers(1, 24), st.sampled_from(SOLVERS))
def test_empty_has_the_sizes_of_fit_for_every_shape(budget, out_features, in_features, sparse):
    method = HassleFree(**budget, sparse=sparse, steps=2)
    weight, stats = random(out_features, in_features), {Gram: gram_of(random(9, in_features))}
    try:
        empty = method.empty(in_features, out_features)
    except ValueError as error:
        with pytest.raises(ValueError) as again:
            method.fit(weight, stats)
        assert str(again.value) == str(error)
        return
    fitted = method.fit(weight, stats)
    assert fitted.spec == empty.spec
    assert fitted.num_params == empty.num_params <= out_features * in_features
    if method.keep is not None:
        allowed = floor(method.keep * out_features * in_features + 1e-9)
        free = in_features + out_features - 1 if method.pattern != "unstructured" else 0  # not even one rank more
        assert allowed - free <= fitted.num_params <= allowed


@pytest.mark.parametrize(("keep", "kappa"), [(0.5, 0.3), (0.3, 0.3), (0.7, 0.5), (0.5, 0.0)])
def test_the_shares_are_the_published_ones(keep, kappa):
    """1 - s = (1 - c)(1 - kappa) with c = 1 - keep."""
    op = HassleFree(keep=keep, low_rank_share=kappa).empty(1024, 4096)
    sparse, rank = (op.terms[0], op.terms[1].rank) if isinstance(op, Sum) else (op, 0)
    assert rank == floor(kappa * keep * 1024 * 4096 / (1024 + 4096) + 1e-9)
    assert sparse.num_values / (1024 * 4096) == pytest.approx(keep * (1 - kappa), abs=5120 / (1024 * 4096))
    assert op.num_params == floor(keep * 1024 * 4096)


@pytest.mark.parametrize(("pattern", "keep"), [("2:4", 0.6), ("2:8", 0.5), ("3:8", 0.375), ("4:8", 0.75)])
def test_a_pattern_leaves_the_rest_to_the_factors(pattern, keep):
    """kappa = (1 - c - N/M) / (1 - c), and rank = kappa (1 - c) O I / (O + I)."""
    kept, size = GROUPED[pattern]
    op = HassleFree(keep=keep, pattern=pattern).empty(512, 512)
    if keep == kept / size:
        assert isinstance(op, Sparse)
    else:
        kappa = (keep - kept / size) / keep
        assert op.terms[1].rank == floor(kappa * keep * 512 * 512 / 1024 + 1e-9)
    assert HassleFree(rank=64, pattern=pattern).empty(512, 512).terms[1].rank == 64


def test_the_patterns_are_those_of_the_operator():
    assert HassleFree.model_fields["pattern"].annotation.__args__ == PATTERNS


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: HassleFree(keep=0.5),
            r"pattern 'unstructured' takes keep with either low_rank_share or rank, got keep",
        ),
        (lambda: HassleFree(keep=0.5, rank=1, low_rank_share=0.3), r"got keep and low_rank_share and rank"),
        (lambda: HassleFree(pattern="2:4"), r"pattern '2:4' takes either keep or rank, got none of them"),
        (lambda: HassleFree(pattern="2:4", keep=0.6, rank=8), r"takes either keep or rank, got keep and rank"),
        (lambda: HassleFree(pattern="1:4", keep=0.6), r"'unstructured', '2:4', '2:8', '3:8' or '4:8'"),
        (lambda: HassleFree(keep=0.5, low_rank_share=1.0), r"less than 1"),
        (lambda: HassleFree(keep=0.5, ratio=0.5), r"Extra inputs are not permitted"),
        (lambda: HassleFree(keep=0.5, rank=1, damping=0.0), r"greater than 0"),
        (
            lambda: HassleFree(pattern="2:4", keep=0.4).empty(64, 128),
            r"keep=0\.4 is 3276 of the 8192 numbers of a 64x128 layer, and pattern 2:4 stores at least 4096; "
            r"keep can be 0\.5 to 1\.",
        ),
        (
            lambda: HassleFree(keep=0.001, rank=0).empty(10, 10),
            r"keep=0\.001 is 0 of the 100 numbers of a 10x10 layer, and pattern unstructured stores at least 1; "
            r"keep can be 0\.01 to 1\.",
        ),
        (
            lambda: HassleFree(keep=0.5, rank=22).empty(64, 128),
            r"rank 22 does not fit into a 64x128 layer: of 4096 numbers pattern unstructured takes at least 1 and "
            r"every rank 192; rank can be 0 to 21\.",
        ),
        (
            lambda: HassleFree(pattern="2:4", rank=99).empty(64, 128),
            r"of 8192 numbers pattern 2:4 takes at least 4096 and every rank 192; rank can be 0 to 21\.",
        ),
        (
            lambda: HassleFree(pattern="2:4", rank=1).empty(30, 8),
            r"2:4 needs in_features that 4 divides, but the layer is 30x8; allowed there: unstructured\.",
        ),
        (
            lambda: HassleFree(keep=0.5, rank=1).fit(torch.ones(8, 8), {Gram: gram_of(torch.zeros(5, 8))}),
            r"calibration inputs are all zero",
        ),
    ],
)
def test_errors_say_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
