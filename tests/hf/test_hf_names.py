"""Models whose checkpoints name weights otherwise, or whose blocks share weights, come back with their operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.plan import Plan

IDS: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **IDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
SIZES = {
    # Its checkpoints hold `weight_proj`, which is `weight_proj.weight` in the model.
    "inkling2_text": {**LLAMA, "head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
                      "swa_head_dim": 8, "d_rel": 8, "moe_intermediate_size": 16, "n_routed_experts": 4,
                      "num_experts_per_tok": 2, "rel_extent": 64, "sliding_window_size": 6},
    # Blocks 1, 3 and 5 share attention and MLP.
    "zamba2": {**LLAMA, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 16,
               "num_mem_blocks": 1, "num_hidden_layers": 6, "layer_types": ["mamba", "hybrid"] * 3,
               "hybrid_layer_ids": [1, 3, 5], "adapter_rank": 4, "chunk_size": 8},
}  # fmt: skip
TOKENS = torch.randint(10, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def make(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES[kind])).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def plan(blocks: str) -> Plan:
    return Plan.model_validate([{"blocks": blocks, "method": {"name": "svd", "keep": 0.6}}])


@pytest.mark.parametrize(
    ("kind", "chosen"), [("inkling2_text", "1"), ("zamba2", "1"), ("zamba2", "3"), ("zamba2", "all")]
)
def test_a_compressed_model_comes_back(kind, chosen, tmp_path):
    model = make(kind)
    compress(model, plan(chosen))
    model.save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert set(again.state_dict()) == set(model.state_dict())
    again.save_pretrained(tmp_path / "two")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "two")), logits(model), atol=1e-5)


def test_blocks_that_share_what_stays_dense_still_share_it(tmp_path):
    model = make("zamba2")
    compress(model, plan("1"))
    model.save_pretrained(tmp_path)
    blocks = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers
    assert blocks[3].shared_transformer.self_attn.q_proj.weight is blocks[5].shared_transformer.self_attn.q_proj.weight
    norms = [blocks[index].shared_transformer.input_layernorm.weight for index in (1, 3, 5)]
    assert norms[0] is norms[1] is norms[2]


def test_blocks_that_share_weights_are_not_read_one_by_one(tmp_path):
    make("zamba2").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"layers\.[35]\..* same weight as model\.layers\.1\..* load_model"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", plan("all"))
    assert not (tmp_path / "out" / "config.json").exists()
