"""What a run says before it begins."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig

from tensormix.recipe import Recipe
from tensormix.run import run_recipe


def test_stacks_that_stay_dense_are_named(tiny, tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = Llama4TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    Llama4ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = Recipe.model_validate(
        {
            "model": str(tmp_path / "model"),
            "plan": [{"sites": ["o"], "method": {"name": "svd", "keep": 0.5}}],
            "evaluate": {"exam": None},
            "diagnose": None,
            "profile": None,
        }
    )
    said: list[str] = []
    run_recipe(recipe, tmp_path / "run", say=said.append)
    (line,) = [line for line in said if "stay dense" in line]
    assert "4 stacks" in line and "model.layers.0.feed_forward.experts.gate_up_proj" in line
    assert f"{2 * 4 * 3 * 32 * 48:,} numbers" in line
