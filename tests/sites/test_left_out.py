"""Blocks that a model cannot do without."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import tensormix
from tensormix.plan import Plan


def test_a_block_whose_state_goes_into_the_cache_cannot_be_left_out():
    """Without a cache the model works without it; what it writes would fail."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_blocks": 3, "num_heads": 4, "chunk_size": 8,
             "qk_dim_factor": 1.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["xlstm"](**sizes)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"blocks\.1: with a cache .* layers"):
        tensormix.compress(model, Plan.model_validate([{"blocks": 1, "method": {"name": "drop_blocks"}}]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("index", range(3))
def test_a_cache_that_blocks_get_by_place_counts_on_without_any_of_them(index):
    """RoFormer asks the cache of its first block how many tokens there were."""
    config = CONFIG_MAPPING["roformer"](
        vocab_size=64, embedding_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64, is_decoder=True, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tensormix.compress(model, Plan.model_validate([{"blocks": index, "method": {"name": "drop_blocks"}}]))
    ids = torch.randint(3, 60, (1, 8))
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=1e-4, atol=1e-5)
