from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tensormix.operators import Bypass, build


@pytest.mark.parametrize("returns", ["tensor", "tuple"])
def test_hidden_states_pass_unchanged(returns):
    x = torch.randn(2, 3, 4)
    out = Bypass(returns=returns)(x, None, attention_mask=None, position_ids=None)
    assert isinstance(out, tuple) == (returns == "tuple")
    assert (out[0] if returns == "tuple" else out) is x


def test_spec_survives_json_and_rebuilds_it():
    op = Bypass(returns="tuple", attention_type="sliding_attention", sentinel="mlp.up.weight")
    twin = build(json.loads(json.dumps(op.spec)))
    assert twin.spec == op.spec
    assert twin.attention_type == "sliding_attention"
    twin.load_state_dict(op.state_dict())


def test_attention_type_exists_only_when_given():
    assert not hasattr(Bypass(), "attention_type")


def test_it_holds_nothing_but_the_sentinel():
    op = Bypass(sentinel="mlp.up.weight")
    assert {name: tensor.shape for name, tensor in op.state_dict().items()} == {"mlp.up.weight": (0,)}
    assert op.num_params == op.macs_per_token == 0


def test_a_dense_block_does_not_load_what_was_saved():
    block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        block.load_state_dict(Bypass(sentinel="0.weight").state_dict(), strict=False)


def test_a_wrong_return_kind_is_answered():
    with pytest.raises(ValueError, match=r"'tensor', 'tuple' or 'tuple of N', got 'tupel', did you mean 'tuple'\?"):
        Bypass(returns="tupel")
