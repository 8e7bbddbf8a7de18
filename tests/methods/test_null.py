from __future__ import annotations

import pytest
import torch
from torch import nn

from tensormix.methods import DropBlocks, MeanOutput, ZeroMethod
from tensormix.statistics import InputMean


def test_the_mean_output_is_the_best_constant():
    """The mean of the outputs minimises the squared error of a constant; moving it anywhere is worse."""
    torch.manual_seed(0)
    weight, x = torch.randn(24, 32), torch.randn(500, 32) + torch.randn(32)
    mean = InputMean(32)
    mean.update(x[:200])
    mean.update(x[200:])
    op = MeanOutput().fit(weight, {InputMean: mean})
    assert op.bias is not None and not op.to_dense().any()
    outputs = x @ weight.T
    torch.testing.assert_close(op(x), outputs.mean(0).expand(500, -1), rtol=1e-4, atol=1e-4)
    zero = ZeroMethod().fit(weight, {})
    assert (outputs - op(x)).norm() < (outputs - zero(x)).norm()


def test_the_mean_output_needs_the_mean():
    assert MeanOutput.needs == (InputMean,)
    with pytest.raises(ValueError, match="InputMean: no tokens were seen"):
        MeanOutput().fit(torch.randn(3, 4), {InputMean: InputMean(4)})


def test_zero_gives_zero_of_the_right_size():
    y = ZeroMethod().fit(torch.randn(3, 4), {})(torch.randn(2, 5, 4))
    assert y.shape == (2, 5, 3) and not y.any()


def test_a_dropped_block_keeps_what_the_model_asks_of_it():
    block = nn.Sequential(nn.Linear(3, 3))
    block.attention_type = "sliding_attention"
    bypass = DropBlocks().replace(block, returns="tuple")
    assert bypass.spec == {
        "operator": "Bypass",
        "returns": "tuple",
        "attention_type": "sliding_attention",
        "sentinel": "0.weight",
    }
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        block.load_state_dict(bypass.state_dict(), strict=False)


def test_a_block_without_parameters_or_attention_type_drops_too():
    assert DropBlocks().replace(nn.Identity()).sizes == {
        "returns": "tensor",
        "attention_type": None,
        "sentinel": "weight",
    }
