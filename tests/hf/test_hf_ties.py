"""Models whose blocks share weights come back with their operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.plan import Plan

SIZES: dict[str, Any] = {
    "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 16, "num_mem_blocks": 1,
    "num_hidden_layers": 6, "layer_types": ["mamba", "hybrid"] * 3, "hybrid_layer_ids": [1, 3, 5],
    "adapter_rank": 4, "chunk_size": 8,
}  # fmt: skip
TOKENS = torch.randint(10, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def make() -> Any:
    """Its blocks 1, 3 and 5 share attention and MLP."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING["zamba2"](**SIZES)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def plan(blocks: str) -> Plan:
    return Plan.model_validate([{"blocks": blocks, "method": {"name": "svd", "keep": 0.6}}])


@pytest.mark.parametrize("chosen", ["1", "3", "all"])
def test_a_compressed_model_comes_back(chosen, tmp_path):
    model = make()
    compress(model, plan(chosen))
    model.save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert set(again.state_dict()) == set(model.state_dict())
    again.save_pretrained(tmp_path / "two")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "two")), logits(model), atol=1e-5)


def test_blocks_that_share_what_stays_dense_still_share_it(tmp_path):
    model = make()
    compress(model, plan("1"))
    model.save_pretrained(tmp_path)
    blocks = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers
    assert blocks[3].shared_transformer.self_attn.q_proj.weight is blocks[5].shared_transformer.self_attn.q_proj.weight
    norms = [blocks[index].shared_transformer.input_layernorm.weight for index in (1, 3, 5)]
    assert norms[0] is norms[1] is norms[2]


def test_blocks_that_share_weights_are_not_read_one_by_one(tmp_path):
    make().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"layers\.[35]\..* same weight as model\.layers\.1\..* load_model"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", plan("all"))
    assert not (tmp_path / "out" / "config.json").exists()
