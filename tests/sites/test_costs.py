"""One way of counting: a block costs what is in it, and of experts only those that a token visits are read."""

from __future__ import annotations

import pytest
import torch

from plans import plan_of
from tensormix.compression import compress
from tensormix.methods import Rtn, Svd
from tensormix.operators import Dense, DenseStack, Experts, ExpertStack, LowRank, Quantized, StackedLinear
from tensormix.profile import num_parameters
from tensormix.sites import blocks, cost_of, find_sites, macs_per_token
from tensormix.storage.bits import stored_bits
from zoo import MOE, make

E, I, O = 4, 12, 8


def stack():
    return ExpertStack(each=LowRank(I, O, rank=2), num_experts=E)


def test_a_stack_is_read_at_the_experts_that_a_token_visits():
    one, whole = LowRank(I, O, rank=2).cost, stack().cost
    assert whole == (E * one.parameters, E * one.bits, one.macs, one.bytes_per_token)
    assert whole.visiting(3) == (E * one.parameters, E * one.bits, 3 * one.macs, 3 * one.bytes_per_token)
    assert cost_of(stack(), 3) == whole.visiting(3)
    assert DenseStack(E, I, O).cost == (E * I * O, 32 * E * I * O, I * O, 4 * I * O)


def test_integers_count_as_numbers_and_as_what_they_store():
    inner = LowRank.from_dense(torch.randn(O, I), rank=2)
    cost = Quantized.of(inner, bits=8).cost
    assert (cost.parameters, cost.macs) == (inner.cost.parameters, inner.cost.macs)
    assert cost.bits == 8 * cost.bytes_per_token < inner.cost.bits


def test_the_bias_belongs_to_the_site():
    op = LowRank(I, O, rank=2)
    before = op.cost
    op.bias = torch.nn.Parameter(torch.zeros(O))
    assert op.cost == before


@pytest.mark.parametrize("family", ["llama", *MOE])
def test_a_block_costs_what_is_in_it(family):
    """Dense, and with some sites compressed: nothing twice, and experts that are not visited are not read."""
    model = make(family)
    rules = [{"method": Svd(keep=0.5), "blocks": "1"}, {"method": Rtn(bits=4), "sites": ["o", "down"], "blocks": "0"}]
    for block, sites in zip(blocks(model), _stacks(model), strict=True):
        idle = sum(
            site.weight.nbytes * (site.num_experts - site.experts_per_token) // site.num_experts for site in sites
        )
        assert cost_of(block) == (
            num_parameters(block),
            stored_bits(block),
            macs_per_token(block),
            stored_bits(block) // 8 - idle,
        )
    compress(model, plan_of(*rules))
    for block in list(blocks(model))[:2]:
        cost, stacks = cost_of(block), [part for part in block.modules() if isinstance(part, StackedLinear)]
        assert (cost.parameters, cost.bits) == (num_parameters(block), stored_bits(block))
        visits = experts_of(block)
        read = cost.bits // 8 - sum(stack.num_bits // 8 - visits * stack.cost.bytes_per_token for stack in stacks)
        assert cost.bytes_per_token == read <= cost.bits // 8
        assert (read < cost.bits // 8) == bool(stacks)


def _stacks(model):
    sites = find_sites(model)
    return [[s for s in sites if s.kind == "experts" and s.block == index] for index, _ in enumerate(blocks(model))]


def experts_of(block):
    return next((part.experts_per_token for part in block.modules() if isinstance(part, Experts)), 1)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_site_and_a_dense_operator_in_its_place_are_counted_alike(family):
    for site in find_sites(make(family)):
        if site.kind == "block":
            cost = cost_of(site.module)
            assert site.cost(cost.bits) == cost
            assert site.cost(cost.bits // 2).bytes_per_token == cost.bytes_per_token // 2  # where it is stored packed
        else:
            kind = (
                DenseStack.around(torch.nn.Parameter(site.weight))
                if site.kind == "experts"
                else Dense.from_dense(site.weight)
            )
            assert site.cost(kind.num_bits) == cost_of(kind, site.experts_per_token)
