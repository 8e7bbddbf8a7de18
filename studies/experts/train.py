"""Train a small mixture of experts on plain English text: 6 blocks of 8 experts, of which a token visits 2.

    python studies/experts/train.py --data ../shared/data --out build/experts

It has 5.0 M numbers. The text, the tokenizer and the schedule are those of the mid-size model. A stopped run goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "quality"))

from train_midsize import arguments, train  # noqa: E402

CONFIG = dict(
    hidden_size=192,
    moe_intermediate_size=128,
    intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=48,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
BALANCE = 0.02  # of the loss that keeps every expert in use


def experts_model(vocabulary: int) -> nn.Module:
    config = Qwen3MoeConfig(**CONFIG, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    # One product for all experts of a block: the loop over experts is three times slower.
    return AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").float()


def loss_of(model: Any, windows: torch.Tensor) -> torch.Tensor:  # (B, T + 1)
    """Of the next token; while training also that of the routers."""
    with torch.autocast("cpu", torch.bfloat16):
        found = model(windows[:, :-1], use_cache=False, output_router_logits=torch.is_grad_enabled())
    loss = nn.functional.cross_entropy(found.logits.flatten(0, 1).float(), windows[:, 1:].flatten())
    return loss + BALANCE * found.aux_loss if torch.is_grad_enabled() else loss


if __name__ == "__main__":
    train(arguments(__doc__.splitlines()[0], HERE / "training.jsonl"), experts_model, loss_of)
