"""Structure and rounding in one fit: the optimum that both share, and where it beats rounding afterwards."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from calibrated import correlated, seen
from tensormix.compression import compress
from tensormix.fitting.output_error import output_error
from tensormix.fitting.rounding_steps import Columns, round_factors
from tensormix.methods import FlatLlm, Gptq, Hqq, Narrow, Rtn, SvdLlm
from tensormix.methods.base import Heads, Layer
from tensormix.methods.flat_llm import head_bases, leading_neurons
from tensormix.methods.narrow import loudest_neurons
from tensormix.operators import Dense, PerHead, Placed, Quantized
from tensormix.operators.packed import Packed
from tensormix.plan import Plan
from tensormix.statistics import Gram, HeldOutGram
from zoo import make, token_ids

I, F, N = 48, 96, 4000
HEADS = Heads(4, 2, 12)


def inputs_of(size, seed=0):
    return correlated(N, size, decades=1.5, seed=seed, mixing=size)


def block():
    generator = torch.Generator().manual_seed(7)
    shapes = {"q": (48, I), "k": (24, I), "v": (24, I), "o": (I, 48), "gate": (F, I), "up": (F, I), "down": (I, F)}
    layers = {role: Layer(torch.randn(shape, generator=generator)) for role, shape in shapes.items()}
    x, z, h = inputs_of(I), inputs_of(48, 1), inputs_of(F, 2)
    inputs = {role: {"o": z, "down": h}.get(role, x) for role in shapes}
    return layers, inputs, {role: seen(inputs[role]) for role in shapes}


def out(op, x):
    with torch.no_grad():
        return x @ op.to_dense().T


@pytest.mark.parametrize("kind", [Narrow, FlatLlm])
def test_nothing_is_lost_by_the_structure_but_what_it_loses_without_rounding(kind):
    """At 8 bits a layer is what the structure alone makes of it, to less than a hundredth."""
    layers, inputs, stats = block()
    values = (inputs["v"] @ layers["v"].weight.T).view(N, 2, 1, 12).expand(N, 2, 2, 12).flatten(1)
    inputs["o"], stats["o"] = values, seen(values)
    alone, both = (m.fit(layers, stats, HEADS) for m in (kind(keep=0.6), kind(keep=0.6, rounding=Gptq(bits=8))))
    if kind is Narrow:  # v and o may pass other directions on
        dense = values @ layers["o"].weight.T
        lost = [(attended(each["v"], each["o"], inputs["v"]) - dense).norm() for each in (alone, both)]
        assert lost[1] < 1.02 * lost[0]
        layers = {role: layer for role, layer in layers.items() if role not in ("v", "o")}
    for role in layers:
        wanted = out(alone[role], inputs[role])
        assert (out(both[role], inputs[role]) - wanted).norm() < 0.01 * wanted.norm()
        assert both[role].num_bits < 0.32 * alone[role].num_bits


@pytest.mark.parametrize("kind", [Narrow, FlatLlm])
def test_every_layer_is_nearer_than_when_the_structure_is_rounded_to_nearest(kind):
    layers, inputs, stats = block()
    sizes = {"bits": 3, "group": 16}
    alone = kind(keep=0.6).fit(layers, stats, HEADS)
    ours = kind(keep=0.6, rounding=Gptq(**sizes)).fit(layers, stats, HEADS)
    theirs = kind(keep=0.6, rounding=Rtn(**sizes, symmetric=False)).fit(layers, stats, HEADS)
    inputs |= {"o": values_left(stats), "down": inputs["down"][:, chosen_of(kind, layers, stats)]}
    if kind is Narrow:  # whose value maps depend on what rounding adds
        layers = {role: layer for role, layer in layers.items() if role not in ("v", "o")}
    for role in layers:
        x = inputs[role]
        if role in ("o", "down"):  # what these read is no longer in the channels in which it was
            wanted, *away = (out(each[role].inner, x) for each in (alone, ours, theirs))
        else:
            wanted, *away = (out(each[role], x) for each in (alone, ours, theirs))
        errors = [(each - wanted).norm() for each in away]
        assert errors[0] < 0.8 * errors[1], role
        assert ours[role].num_bits == theirs[role].num_bits


def test_down_in_integers_misses_the_dense_outputs_by_the_sum_of_both_losses():
    """Least squares leave what z cannot tell, so the squares add up, and the rounding step sees the right loss."""
    layers, _, stats = block()
    alone, both = (m.fit(layers, stats, None)["down"] for m in (mlp(None), mlp(Gptq(bits=3, group=16))))
    gram = stats["down"][Gram].mean
    chosen = chosen_of(Narrow, layers, stats, F // 2)
    wide = torch.zeros(2, I, F, dtype=torch.float64)
    wide[0][:, chosen], wide[1][:, chosen] = (each.inner.to_dense().detach().double() for each in (alone, both))
    dense = layers["down"].weight.double()
    structure, total = (output_error(dense - each, gram) for each in wide)
    assert total - structure == pytest.approx(output_error(wide[0] - wide[1], gram), rel=1e-4)


def mlp(rounding):
    class Alone(Narrow):
        def fit(self, layers, stats, heads):
            return super().fit({role: layers[role] for role in ("gate", "up", "down")}, stats, heads)

    return Alone(keep=0.5, rounding=rounding)


def chosen_of(kind, layers, stats, count=int(0.6 * F)):
    gram = stats["down"][Gram].mean
    return loudest_neurons(layers["down"].weight, gram, count) if kind is Narrow else leading_neurons(gram, count, 1e-6)


def values_left(stats):
    """What o reads of the values once each head has 7 of its 12 channels, in FLAT-LLM."""
    maps = head_bases(stats["o"][Gram].mean, HEADS, 7).mT
    return block()[1]["o"] @ torch.block_diag(*maps.repeat_interleave(2, dim=0)).float().T


def attended(op_v, op_o, x, heads=HEADS):
    """What v and o make of inputs when every token attends to itself alone."""
    values = out(op_v, x).unflatten(-1, (heads.num_kv_heads, -1))
    return out(op_o, values.repeat_interleave(heads.num_heads // heads.num_kv_heads, dim=-2).flatten(-2))


@pytest.mark.parametrize("bits", [3, 4])
def test_value_maps_do_not_undo_directions_that_drown_in_what_rounding_adds(bits):
    """Half of what a head carries is a thousandth of the rest, and o reads it 300 times as loud, so it counts a little.

    What rounding adds to v is louder than that by far; maps that undo it lose everything.
    """
    generator, quiet = torch.Generator().manual_seed(3), 1e-3
    turn, *mix = (
        torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for size in (I, HEADS.head_dim, HEADS.head_dim)
    )
    sizes = torch.cat([torch.ones(I // 2), quiet * torch.ones(I // 2)])
    x, new = (torch.randn(N, I, generator=generator) * sizes @ turn.T for _ in range(2))
    rows = torch.randn(2, 12, I, generator=generator)
    rows[:, :6, I // 2 :], rows[:, 6:, : I // 2] = 0, 0
    heard = torch.cat([torch.ones(6), 0.3 / quiet * torch.ones(6)])
    read = torch.randn(I, 2, 2, 12, generator=generator) * heard
    v = torch.stack([q @ each for q, each in zip(mix, rows, strict=True)]).flatten(0, 1) @ turn.T
    o = torch.stack([read[:, head] @ mix[head].T for head in range(2)], dim=1).flatten(1)
    layers = {"v": Layer(v), "o": Layer(o)}
    z = (x @ v.T).view(N, 2, 1, 12).expand(N, 2, 2, 12).flatten(1)
    stats = {"v": seen(x), "o": seen(z)}
    wanted = attended(*(Dense.from_dense(layers[role].weight) for role in "vo"), new)
    lost = {}
    for kind in (Narrow, Deaf):
        made = kind(keep=0.6, rounding=Gptq(bits=bits, group=16)).fit(layers, stats, HEADS)
        lost[kind] = float((attended(made["v"], made["o"], new) - wanted).norm() / wanted.norm())
    assert lost[Narrow] < 0.5 < 2 < lost[Deaf], lost


class Deaf(Narrow):
    """Maps of the values as if nothing were rounded."""

    def share_lost(self, weight, gram, seen):
        return 0.0


def test_factors_of_heads_are_corrected_each_for_its_own_inputs():
    layers, inputs, stats = block()
    ours, plain = (
        FlatLlm(keep=0.6, rounding=rounding).fit(layers, stats, HEADS)["q"]
        for rounding in (Gptq(bits=4, group=16), Rtn(bits=4, group=16, symmetric=False))
    )
    assert isinstance(ours, Quantized) and isinstance(ours.inner, PerHead)
    x, dense = inputs["q"], inputs["q"] @ layers["q"].weight.T
    assert (out(ours, x) - dense).norm() < (out(plain, x) - dense).norm()
    left = ours.dequantized().left.detach().unflatten(0, (4, -1))
    assert left.shape[2] == ours.inner.rank


def test_the_left_factor_of_a_low_rank_sees_what_rounding_made_of_the_right_one():
    """The right one has 2 bits, the left one 8: it is the least squares for the rounded one, to the step of 8 bits."""
    layers, inputs, stats = block()
    factors = SvdLlm(keep=0.5).fit(layers["q"].weight, stats["q"])
    left, right = factors.left.detach().double(), factors.right.detach().double()
    op, gram = Quantized.of(factors, bits=8, group=16, symmetric=False), stats["q"][Gram].mean
    op.right = Packed(right.shape, bits=2, group=16, symmetric=False)
    round_factors(op, layers["q"].weight.double(), left, right, gram, Columns.of(gram, 0.01), 0.01)
    right, x = op.right.numbers(torch.float64), inputs["q"].double()
    best = torch.linalg.lstsq(x @ right.T, x @ layers["q"].weight.double().T).solution.T
    assert float((op.left.numbers(torch.float64) - best).norm() / best.norm()) < 0.05
    assert float((left - best).norm() / best.norm()) > 0.1


def test_a_whole_layer_is_rounded_where_everything_is_kept():
    layers, _, stats = block()
    made = Narrow(keep=1.0, rounding=Gptq(bits=3, group=16)).fit(layers, stats, HEADS)
    alone = Gptq(bits=3, group=16).fit(layers["up"].weight, stats["up"])
    assert torch.equal(made["up"].to_dense(), alone.to_dense())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_recipe_says_both_and_the_model_runs(family):
    model = make(family)
    method = {"name": "narrow", "keep": 0.7, "rounding": {"name": "gptq", "bits": 4, "group": 8}}
    rows = compress(model, Plan.model_validate([{"method": method}]), [token_ids()])
    assert all(row["bits"] < 16 * row["dense_parameters"] for row in rows)
    assert model(token_ids()).logits.isfinite().all()
    kinds = {type(part.inner) for part in model.modules() if isinstance(part, Placed)}
    assert kinds == {Quantized}


def test_what_is_rounded_is_said_once():
    with pytest.raises(ValidationError, match="rounding takes rtn without 'of', since narrow says what is rounded"):
        Narrow(keep=0.5, rounding=Rtn(bits=4, of=SvdLlm(keep=0.5)))
    assert Narrow(keep=0.5, rounding=Hqq(bits=4)).needs_at("q") == (Gram,)
    assert FlatLlm(keep=0.5, rounding=Gptq(bits=4)).needs_at("up") == (Gram, HeldOutGram)
    assert isinstance(FlatLlm(keep=0.5).empty({"up": (8, 8), "down": (8, 8), "gate": (8, 8)}, None)["up"].inner, Dense)
