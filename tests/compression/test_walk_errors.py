"""What the walk refuses, the sentence that says so, and that nothing is left half done."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from plans import plan_of
from tensormix.compression import compress
from tensormix.compression.observing import observe
from tensormix.methods import LinearMethod, MeanOutput, Mixt, ZeroMethod
from tensormix.operators import LowRank, StructuredLinear
from tensormix.sites import blocks, find_sites
from tensormix.statistics import InputMean
from zoo import NUM_BLOCKS, make, token_ids


class Broken(LinearMethod):
    """Its operators are not finite."""

    name: Literal["broken"] = "broken"

    def empty(self, in_features, out_features):
        return LowRank(in_features, out_features, rank=1)

    def fit(self, weight, stats):
        return LowRank.from_dense(weight, rank=1).apply(_spoil)


def _spoil(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.fill_(torch.nan)


def test_batches_are_asked_for():
    with pytest.raises(ValueError, match=r"mean_output needs calibration batches \(InputMean\), but none were given"):
        compress(make("llama"), plan_of({"method": MeanOutput()}))


def test_no_batches_in_the_iterable():
    with pytest.raises(ValueError, match="there are no calibration batches: the iterable is empty"):
        compress(make("llama"), plan_of({"method": MeanOutput()}), [])


def test_batches_must_be_token_ids():
    with pytest.raises(ValueError, match=r"must be token ids of shape \(B, T\), got torch.int64 \(12,\)"):
        compress(make("llama"), plan_of({"method": MeanOutput()}), [token_ids()[0]])


def test_batches_may_be_a_generator():
    rows = compress(make("llama"), plan_of({"method": MeanOutput()}), (token_ids(seed=n) for n in range(2)))
    assert len(rows) == 7 * NUM_BLOCKS


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite(value):
    model = make("llama")
    site = next(site for site in find_sites(model) if site.name.endswith("1.mlp.down_proj"))
    site.module.weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: the weight holds NaN or infinite values"):
        compress(model, plan_of({"method": ZeroMethod()}))
    assert model.get_submodule(site.name) is site.module
    assert not any(isinstance(module, StructuredLinear) for module in blocks(model)[1].modules())


def test_inputs_that_are_not_finite():
    model = make("llama")
    blocks(model)[1].mlp.gate_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: its inputs hold NaN or infinite values"):
        compress(model, plan_of({"method": MeanOutput(), "blocks": "1", "sites": ("down",)}), [token_ids()])
    assert type(blocks(model)[1].mlp.down_proj) is nn.Linear


def test_an_operator_that_is_not_finite():
    model = make("llama")
    with pytest.raises(ValueError, match=r"0.self_attn.q_proj: the fitted LowRank holds NaN or infinite values"):
        compress(model, plan_of({"method": Broken(), "blocks": "0"}))
    assert type(blocks(model)[0].self_attn.q_proj) is nn.Linear


def test_a_site_that_no_token_reaches():
    model = make("llama")
    layer = blocks(model)[0]
    layer.spare = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"model.layers.0.spare: no calibration token reached this site"):
        compress(model, plan_of({"method": MeanOutput(), "blocks": "0"}), [token_ids()])


def test_sizes_are_checked_before_anything_is_changed():
    model = make("llama")
    last = NUM_BLOCKS - 1  # the blocks before it would be compressed by the time the walk comes there
    with pytest.raises(ValueError, match=rf"model.layers.{last}.self_attn.q_proj: MixT"):
        compress(model, plan_of({"blocks": str(last), "method": Mixt(num_branches=9)}, {"method": ZeroMethod()}))
    assert not any(isinstance(module, StructuredLinear) for module in model.modules())


def test_an_error_leaves_no_recorder_behind():
    model = make("llama")
    real = list(blocks(model))
    with pytest.raises(ValueError):
        compress(model, plan_of({"method": MeanOutput()}), [token_ids().float()])
    assert list(blocks(model)) == real


def test_observe_removes_its_hooks_after_an_error():
    model = make("llama")
    sites = {site.name: site for site in find_sites(model)}
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(RuntimeError), observe(model, sites, {name: [{InputMean: InputMean(32)}]}):
        assert len(sites[name].module._forward_pre_hooks) == 1
        raise RuntimeError
    assert len(sites[name].module._forward_pre_hooks) == 0
