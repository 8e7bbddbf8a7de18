"""Rounding to nearest as a method: what it promises, and what it makes of other methods' fits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tensormix.compression import compress
from tensormix.explain import explain
from tensormix.methods import METHODS, Gptq, LinearMethod, MeanOutput, Mixt, Rtn, Svd, ZeroMethod
from tensormix.methods.rounding import IntegerGrid
from tensormix.operators import Dense, LowRank, MixT, Quantized
from tensormix.plan import Plan
from tensormix.statistics import InputMean
from zoo import make, token_ids

I, O = 48, 80
BITS = [2, 3, 4, 8]
GRANULARITIES = [{"granularity": "group", "group": 16}, {"granularity": "channel"}, {"granularity": "tensor"}]


def error(weight, method):
    """(Frobenius norm of the error, the largest error that the scales allow)."""
    op = method.fit(weight, {})
    scales = op.get_buffer("matrix.scales")
    return float((op.to_dense() - weight).norm()), float(scales.max()) / 2


def test_published_baseline_is_one_scale_for_the_weight():
    """B13: s = max|W| / (2^(b-1) - 1), W' = clamp(round(W / s)) s, b * numel + 16 bits."""
    weight = torch.randn(O, I)
    for bits in BITS:
        op = Rtn(bits=bits, granularity="tensor").fit(weight, {})
        top = 2 ** (bits - 1) - 1
        scale = (weight.abs().max() / top).bfloat16().float()
        assert torch.equal(op.to_dense(), (weight / scale).round().clamp(-top, top) * scale)
        assert op.num_bits == bits * O * I + 16
        assert (op.num_params, op.macs_per_token) == (O * I, O * I)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from(BITS), st.sampled_from(GRANULARITIES), st.booleans(),
    st.integers(0, 2**20),
)  # fmt: skip
def test_it_is_idempotent_and_within_half_a_scale(rows, columns, bits, granularity, symmetric, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    method = Rtn(bits=bits, symmetric=symmetric, **granularity)
    op = method.fit(weight, {})
    once = op.to_dense()
    assert float((once - weight).abs().max()) <= float(op.get_buffer("matrix.scales").max()) / 2 * (1 + 1e-6)
    if symmetric:
        assert torch.equal(method.fit(once, {}).to_dense(), once)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_weight_on_the_grid_is_exact(bits, symmetric, dtype):
    steps = 2**bits - 1
    codes = torch.randint(0, steps + 1 - symmetric, (16, 12))
    codes[:, 0], codes[:, 1] = 0, steps - symmetric  # so that the scale is seen
    weight = ((codes - steps // 2) * 2.0 ** torch.randint(-9, 4, (16, 1))).to(dtype)
    op = Rtn(bits=bits, granularity="channel", symmetric=symmetric).fit(weight, {})
    assert torch.equal(op.to_dense(), weight)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_are_nearer(granularity, symmetric):
    weight = torch.randn(O, I, generator=torch.Generator().manual_seed(0))
    errors = [error(weight, Rtn(bits=bits, symmetric=symmetric, **granularity)) for bits in BITS]
    for coarse, fine in pairwise(errors):
        assert fine[0] < coarse[0] and fine[1] < coarse[1]


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(BITS), st.integers(1, 12), st.integers(1, 60), st.booleans(), st.integers(0, 2**20))
def test_finer_granularity_never_has_a_larger_bound(bits, rows, columns, symmetric, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10 ** torch.randn(rows, 1, generator=generator)
    kinds = [{"granularity": "group", "group": 4}, {"granularity": "group", "group": 16}, *GRANULARITIES[1:]]
    bounds = [error(weight, Rtn(bits=bits, symmetric=symmetric, **kind))[1] for kind in kinds]
    assert bounds == sorted(bounds)


def test_a_loud_row_spoils_the_others_unless_each_has_its_scale():
    weight = torch.randn(O, I, generator=torch.Generator().manual_seed(0))
    weight[0] *= 100
    quiet = [
        float((Rtn(bits=4, **kind).fit(weight, {}).to_dense() - weight)[1:].norm() / weight[1:].norm())
        for kind in GRANULARITIES
    ]
    assert quiet[0] < quiet[1] < 0.2 and quiet[2] == 1  # of one scale for all nothing is left of the other rows


def test_zero_points_are_worth_their_bits_where_there_are_few():
    """At 2 bits, three values around zero against four: better than eight times as many symmetric scales."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    plain, zeros = Rtn(bits=2, group=16), Rtn(bits=2, group=128, symmetric=False)
    assert zeros.fit(weight, {}).num_bits < plain.fit(weight, {}).num_bits
    assert error(weight, zeros)[0] < 0.9 * error(weight, plain)[0]


def test_a_weight_of_zeros_stays_zero():
    weight = torch.randn(O, I)
    weight[3], weight[7, 16:32] = 0, 0
    for kind in GRANULARITIES:
        for symmetric in (True, False):
            dense = Rtn(bits=3, symmetric=symmetric, **kind).fit(weight, {}).to_dense()
            assert dense.isfinite().all() and not dense[3].any() and not dense[7, 16:32].any()


# Of other methods


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inner", [Svd(keep=0.5), Mixt(num_branches=3), ZeroMethod()], ids=lambda m: m.name)
def test_the_parts_of_another_method_are_rounded(inner, bits):
    weight = torch.randn(O, I)
    op, plain = Rtn(bits=bits, granularity="tensor", of=inner).fit(weight, {}), inner.fit(weight, {})
    assert op.spec["inner"] == plain.spec
    for name, parameter in plain.named_parameters():
        alone = Rtn(bits=bits, granularity="tensor").fit(parameter.detach(), {})
        assert torch.equal(op.dequantized().get_parameter(name), alone.to_dense())
    count = sum(p.numel() for p in plain.parameters())
    assert op.num_params == count
    # Every core and factor is a whole number of words here, so nothing is padded: the published count.
    assert op.num_bits == bits * count + 16 * len(list(plain.parameters()))


def test_int8_cores_move_the_outputs_of_a_mixture_by_less_than_the_bound():
    """|y' - y| <= 1/num_branches sum_k ||core_k' - core_k||_F |x|, with ||core' - core||_F <= sqrt(P Q) s / 2: the
    identities beside a core do not change its spectral norm, which the Frobenius norm bounds."""
    torch.manual_seed(0)
    weight, x = torch.randn(O, I, dtype=torch.float64), torch.randn(100, I, dtype=torch.float64)
    op, plain = (
        method.fit(weight, {})
        for method in (Rtn(bits=8, granularity="tensor", of=Mixt(num_branches=3)), Mixt(num_branches=3))
    )
    assert isinstance(plain, MixT)
    root = (plain.core_in * plain.core_out) ** 0.5
    bound = sum(root * float(op.get_buffer(f"core_{k}.scales").max()) / 2 for k in range(3)) / 3
    with torch.no_grad():
        exact, rounded = plain(x), op(x)
    moved, size = (rounded - exact).norm(dim=1) / x.norm(dim=1), exact.norm(dim=1) / x.norm(dim=1)
    assert 0 < float(moved.max()) <= bound < 0.2 * float(size.min())


def test_rounding_a_fit_is_not_fitting_the_rounded_weight():
    weight = torch.randn(O, I, generator=torch.Generator().manual_seed(0))
    op = Rtn(bits=4, of=Svd(keep=0.5)).fit(weight, {})
    assert isinstance(op.dequantized(), LowRank)
    assert torch.linalg.matrix_rank(op.to_dense()) <= op.inner.rank < I


def test_it_needs_what_the_inner_method_needs():
    assert Rtn.needs == Rtn(bits=4).needs == Rtn(bits=4, of=Svd(keep=0.5)).needs == ()
    assert Rtn(bits=4, of=MeanOutput()).needs == MeanOutput.needs == (InputMean,)


def test_a_constant_of_the_inner_method_stays_a_bias():
    method, stats = Rtn(bits=4, of=MeanOutput()), {InputMean: InputMean(I)}
    stats[InputMean].update(torch.randn(20, I) + 1)
    weight = torch.randn(O, I)
    op, plain = method.fit(weight, stats), MeanOutput().fit(weight, stats)
    assert torch.equal(op.bias, plain.bias)
    assert torch.equal(op(torch.randn(3, I)), plain(torch.randn(3, I)))
    assert method.empty(I, O).bias.shape == (O,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inner", [None, Svd(keep=0.3), Mixt(num_branches=3), MeanOutput()], ids=str)
def test_empty_is_what_fit_gives_without_the_numbers(inner, dtype):
    method = Rtn(bits=3, group=16, of=inner)
    stats = {InputMean: InputMean(I)}
    stats[InputMean].update(torch.randn(5, I))
    weight = torch.randn(O, I, dtype=dtype)
    fitted, empty = method.fit(weight, stats), method.empty(I, O)
    assert empty.spec == fitted.spec
    assert (empty.num_params, empty.macs_per_token) == (fitted.num_params, fitted.macs_per_token)
    shapes = {name: tensor.shape for name, tensor in fitted.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    assert fitted.to_dense().dtype == dtype


# In a plan


def test_a_plan_calibrates_the_inner_method_and_rounds_what_it_fits():
    """In a model: the second block sees what the first, rounded, passes on."""
    inner, small = {"name": "svd_llm", "keep": 0.6}, {"name": "rtn", "bits": 8, "granularity": "channel"}
    plain, rounded = make("llama"), make("llama")
    compress(plain, Plan.model_validate([{"blocks": "0-1", "method": inner}]), [token_ids()])
    rows = compress(rounded, Plan.model_validate([{"blocks": "0-1", "method": {**small, "of": inner}}]), [token_ids()])
    assert {row["operator"] for row in rows} == {"Quantized"} and len(rows) == 14
    with torch.no_grad():
        near, exact = (model(token_ids(seed=3)).logits for model in (rounded, plain))
    assert 0 < float((near - exact).norm()) < 0.05 * float(exact.norm())


def test_the_walk_names_the_site_of_a_bad_weight():
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    plan = Plan.model_validate([{"method": {"name": "rtn", "bits": 4}}])
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: the weight holds NaN"):
        compress(model, plan)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("symmetric", [True, False])
def test_without_a_walk_a_bad_weight_is_refused_too(bad, symmetric):
    weight = torch.randn(O, I, dtype=torch.float64)
    weight[1, 2] = bad
    sentence = r"^Quantized: matrix of the Dense cannot be rounded: it holds NaN or infinite values, or ones above 3e38"
    with pytest.raises(ValueError, match=sentence):
        Rtn(bits=4, symmetric=symmetric).fit(weight, {})


def test_every_linear_method_but_this_may_stand_inside():
    linear = {cls for cls in METHODS.values() if issubclass(cls, LinearMethod) and not issubclass(cls, IntegerGrid)}
    for rounding in (Rtn, Gptq):
        annotation = str(rounding.model_fields["of"].annotation)
        assert all(f".{cls.__name__}" in annotation for cls in linear)


def test_it_survives_json_and_is_frozen():
    for method in (Rtn(bits=4), Rtn(bits=2, granularity="channel", symmetric=False, of=Svd(keep=0.5))):
        again = Rtn.model_validate_json(method.model_dump_json())
        assert again == method and hash(again) == hash(method)
        with pytest.raises(ValidationError, match="frozen"):
            method.bits = 8
    rule = {"method": {"name": "rtn", "bits": 4, "of": {"name": "svd", "keep": 0.5}}}
    plan = Plan.model_validate([rule])
    assert plan.root[0].method == Rtn(bits=4, of=Svd(keep=0.5))
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ({"bits": 5}, r"plan\[0\].method.bits: must be 2, 3, 4 or 8, got 5\."),
        ({"bits": True}, r"method.bits: must be 2, 3, 4 or 8, got True"),
        ({}, r"plan\[0\].method: missing 'bits'\. Known: name, bits, granularity, group, symmetric, zero_bits, of\."),
        (
            {"bits": 4, "granularity": "chanel"},
            r"'tensor', 'channel' or 'group', got 'chanel', did you mean 'channel'\?",
        ),
        ({"bits": 4, "group": 0}, r"method.group: input should be greater than or equal to 1, got 0\."),
        (
            {"bits": 4, "granularity": "channel", "group": 64},
            r"method.group: 64 has no meaning with granularity 'channel'; leave it out, or write granularity 'group'\.",
        ),
        ({"bits": 4, "of": {"name": "svd", "keeps": 1}}, r"method.of: unknown key 'keeps', did you mean 'keep'\?"),
        ({"bits": 4, "of": {"name": "rtn", "bits": 4}}, r"method.of: unknown name 'rtn'\. Known: mixt, svd"),
        ({"bits": 4, "of": {"name": "drop_blocks"}}, r"method.of: unknown name 'drop_blocks'\. Known: mixt, svd"),
        ({"bits": 4, "of": {"name": "svds", "keep": 0.5}}, r"unknown name 'svds', did you mean 'svd'\?"),
        ({"bits": 4, "of": "svd"}, r"method.of: must be keys and values, got 'svd'\."),
    ],
)
def test_errors_say_what_is_allowed(method, sentence):
    data = [{"method": {"name": "rtn", **method}}]
    with pytest.raises(ValidationError) as caught:
        Plan.model_validate(data)
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(explain(caught.value, Plan, data, "plan"))


def test_a_site_that_the_inner_method_cannot_take_is_refused_before_anything_is_fitted():
    with pytest.raises(ValueError, match=r"largest possible is 4"):
        Rtn(bits=4, of=Mixt(num_branches=5)).empty(64, 128)
    op = Rtn(bits=4).empty(64, 128)
    assert isinstance(op, Quantized) and isinstance(op.inner, Dense)
