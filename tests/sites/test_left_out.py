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
