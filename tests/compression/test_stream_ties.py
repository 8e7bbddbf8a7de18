"""Models whose blocks share weights."""

from __future__ import annotations

from typing import Any

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


def test_blocks_that_share_weights_are_compressed_from_files_as_in_memory(tmp_path):
    """What they share stays dense; a block reads it from where it is stored, which is with another block."""
    model, folder = make(), tmp_path / "dense"
    model.save_pretrained(folder)
    plan = Plan.model_validate([{"sites": ".*mamba.*", "method": {"name": "svd_llm", "keep": 0.5}}])
    compress_checkpoint(folder, tmp_path / "out", plan, [TOKENS])
    compress(model, plan, [TOKENS])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    blocks = again.model.layers
    assert blocks[3].shared_transformer.self_attn.q_proj.weight is blocks[1].shared_transformer.self_attn.q_proj.weight
