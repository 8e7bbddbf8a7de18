"""Rounding with correction: where it must equal rounding to nearest, where it must beat it, and when it is left."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from calibrated import correlated, error, seen
from tensormix.compression import compress
from tensormix.fitting.rounding_steps import Columns, corrected_codes, searched_grid
from tensormix.methods import Gptq, Rtn, SvdLlm
from tensormix.operators.packed import Packed
from tensormix.plan import Plan
from tensormix.statistics import Gram, HeldOutGram
from zoo import make, token_ids

I, O = 96, 40


def inputs(num_tokens, size=I, seed=0):
    return correlated(num_tokens, size, decades=2, seed=seed)


def weight(seed=0):
    return torch.randn(O, I, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_beats_rounding_to_nearest_on_new_tokens(bits, symmetric):
    w, x = weight(), inputs(1000, seed=1)
    ours, facts = Gptq(bits=bits, group=32, symmetric=symmetric).fit_with_facts(w, seen(inputs(3000)))
    plain = Rtn(bits=bits, group=32, symmetric=symmetric).fit(w, {})
    assert facts["rounding"] == "corrected"
    assert error(ours, w, x) < 0.6 * error(plain, w, x)
    assert ours.num_bits == plain.num_bits


def test_with_inputs_that_are_not_correlated_each_number_is_the_nearest():
    w, part = weight().double(), Packed((O, I), bits=3, group=16, symmetric=False)
    scales, zeros = searched_grid(part, w, torch.ones(I, dtype=torch.float64))
    columns = Columns.of(torch.diag(torch.rand(I).double() + 0.1), 0.01)
    found = corrected_codes(part, w, columns, scales, zeros)[0]
    nearest = part.nearest(part.grouped(w), scales, zeros).flatten(1)
    assert torch.equal(found, nearest)


def test_two_columns_reach_the_best_of_all_codes():
    """The second column, by its best step for what the first one lost: of all pairs with that first code the best."""
    generator = torch.Generator().manual_seed(3)
    part = Packed((1, 2), bits=2, group=2, symmetric=False)
    for _ in range(20):
        w, root = torch.randn(1, 2, generator=generator).double(), torch.randn(2, 2, generator=generator).double()
        gram = root @ root.T + 0.1 * torch.eye(2).double()
        scales, zeros = searched_grid(part, w, gram.diagonal())

        def loss(codes, w=w, gram=gram, scales=scales, zeros=zeros):
            missed = (torch.tensor([codes]).double() - zeros) * scales - w
            return float(missed @ gram @ missed.T)

        found = corrected_codes(part, w, Columns.of(gram, 1e-9), scales, zeros)[0][0].tolist()
        first = int(gram.diagonal().argmax())
        same = [codes for codes in product(range(4), repeat=2) if codes[first] == found[first]]
        assert loss(found) == pytest.approx(min(map(loss, same)), abs=1e-9)


def test_a_weight_on_the_grid_is_exact():
    w = Rtn(bits=4, group=16).fit(weight(), {}).to_dense()
    op = Gptq(bits=4, group=16, symmetric=True).fit(w, seen(inputs(2000)))
    assert torch.equal(op.to_dense(), w)


def test_cut_ranges_lose_no_more_than_whole_ones():
    w, importance = weight().double(), torch.rand(I).double()
    for bits, symmetric in product((2, 3, 4), (True, False)):
        part = Packed((O, I), bits=bits, group=32, symmetric=symmetric)

        def lost(scales, zeros, part=part):
            part.put(scales, zeros, part.nearest(part.grouped(w), scales, zeros))
            return float(((part.numbers(torch.float64) - w).square() * importance).sum())

        wide = part.grouped(w)
        assert lost(*searched_grid(part, w, importance)) <= lost(*part.grid(wide.amin(-1), wide.amax(-1)))


def test_held_out_tokens_that_say_otherwise_keep_plain_rounding():
    """What is fitted to is nothing like what is held out."""
    w, stats = weight(), seen(inputs(3000))
    held = stats[HeldOutGram]
    held._held = torch.eye(I, dtype=torch.float64) * float(stats[Gram].sum.trace())
    stats[Gram]._held = stats[Gram].sum + held.sum
    op, facts = Gptq(bits=3, group=32).fit_with_facts(w, stats)
    plain = Rtn(bits=3, group=32, symmetric=False).fit(w, {})
    errors = facts["held_out_errors"]
    assert facts["rounding"] == "nearest" and errors["nearest"] < errors["corrected"]
    assert torch.equal(op.to_dense(), plain.to_dense())


def test_one_token_is_too_few_to_hold_one_out():
    op, facts = Gptq(bits=3, group=32).fit_with_facts(weight(), seen(inputs(1)))
    assert facts["rounding"] == "nearest"
    assert torch.equal(op.to_dense(), Rtn(bits=3, group=32, symmetric=False).fit(weight(), {}).to_dense())


def test_a_low_rank_is_refitted_to_what_its_right_factor_became():
    w, x, stats = weight(), inputs(1000, seed=1), seen(inputs(4000))
    of = SvdLlm(keep=0.5)
    ours = Gptq(bits=4, group=32, of=of).fit(w, stats)
    plain = Rtn(bits=4, group=32, symmetric=False, of=of).fit(w, stats)
    assert error(of.fit(w, stats), w, x) < error(ours, w, x) < error(plain, w, x)
    assert ours.num_bits == plain.num_bits


def test_what_it_cannot_correct_is_refused_by_name():
    method = Gptq.model_validate({"bits": 4, "of": {"name": "mixt", "num_branches": 3}})
    with pytest.raises(ValueError, match=r"gptq.*MixT.*rtn or hqq"):
        method.empty(64, 64)


def test_a_model_whose_inputs_do_not_span_its_columns_is_rounded_and_says_how():
    model = make("llama")
    rows = compress(model, Plan.of([{"method": {"name": "gptq", "bits": 3, "group": 8}}]), [token_ids()])
    assert {row["rounding"] for row in rows} <= {"nearest", "corrected"}
    assert model(token_ids()).logits.isfinite().all()
