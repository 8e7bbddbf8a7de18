"""A model from one block on: the same to the bit as the whole of it, whatever was changed in that block."""

import pytest
import torch

from tensormix.sites import blocks
from tensormix.sites.tails import Tails
from zoo import MOE, ZOO, make, token_ids

BATCHES = [token_ids(rows=2, length=8, seed=1), token_ids(rows=1, length=5, seed=2)]


def tails_of(model):
    def run(number):
        with torch.no_grad():
            return model(BATCHES[number], use_cache=False).logits

    return Tails(model, len(BATCHES), run), run


@pytest.mark.parametrize("family", [*ZOO, *MOE])
def test_what_runs_from_a_block_on_is_the_whole_model_to_the_bit(family):
    model = make(family).eval()
    before = [*blocks(model)]
    tails, run = tails_of(model)
    assert all(torch.equal(first, run(number)) for number, first in enumerate(tails.first))
    for index in (0, 2, 3):
        with torch.no_grad():
            weight = next(p for p in blocks(model)[index].parameters() if p.dim() == 2)
            before_change = weight.clone()
            weight.add_(0.1)
            for number, found in enumerate(tails.run(index)):
                assert torch.equal(found, run(number)) and not torch.equal(found, tails.first[number])
            weight.copy_(before_change)
    assert [*blocks(model)] == before


def test_the_blocks_before_do_not_run():
    model = make("llama").eval()
    tails, _ = tails_of(model)
    assert tails.is_chained
    ran = []
    for index, block in enumerate(blocks(model)):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    assert len(list(tails.run(2))) == 2
    assert ran == [2, 3, 2, 3]


def test_after_an_error_the_blocks_are_back():
    model = make("llama").eval()
    before = [*blocks(model)]
    tails, _ = tails_of(model)
    blocks(model)[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(tails.run(2))
    assert [*blocks(model)] == before


def test_where_the_model_changes_states_between_blocks_it_runs_whole():
    model = make("llama").eval()
    layers = blocks(model)
    layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    tails, run = tails_of(model)
    assert not tails.is_chained
    with torch.no_grad():
        layers[2].mlp.up_proj.weight.add_(0.1)
    assert all(torch.equal(found, run(number)) for number, found in enumerate(tails.run(2)))
