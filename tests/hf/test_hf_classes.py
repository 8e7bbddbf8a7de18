"""Which class of transformers reads a folder: the one that writes text, or what its own config names."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

import tensormix
from tensormix.hf import class_of
from tensormix.models import load_model
from tensormix.plan import Plan
from zoo import ZOO, make, token_ids

SMALL = Plan.model_validate([{"method": {"name": "svd", "keep": 0.5}}])
OTHERS = {"bare": AutoModel, "classifier": AutoModelForSequenceClassification, "tags": AutoModelForTokenClassification}


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_a_model_without_a_head_for_text_is_compressed_as_what_it_is(kind, tmp_path):
    make("llama").save_pretrained(tmp_path / "causal")
    torch.manual_seed(0)
    model = OTHERS[kind].from_pretrained(tmp_path / "causal").eval()
    model.save_pretrained(tmp_path / "dense")
    assert tensormix.compress_checkpoint(tmp_path / "dense", tmp_path / "small", SMALL, [token_ids()])
    tensormix.compress(model, SMALL, [token_ids()])
    wanted = model(token_ids())[0]
    for again in (load_model(tmp_path / "small"), OTHERS[kind].from_pretrained(tmp_path / "small").eval()):
        assert type(again) is type(model) and torch.equal(again(token_ids())[0], wanted)
    named = json.loads((tmp_path / "small" / "config.json").read_text())["architectures"]
    assert named == [type(model).__name__]


@pytest.mark.parametrize(
    ("family", "architectures", "expected"),
    [
        ("llama", ["LlamaModel"], "LlamaModel"),
        ("llama", ["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        ("llama", ["LlamaForCausalLM"], "LlamaForCausalLM"),
        ("llama", ["MistralModel"], "LlamaForCausalLM"),
        ("llama", ["SomethingElse"], "LlamaForCausalLM"),
        ("llama", None, "LlamaForCausalLM"),
        ("qwen3", ["Qwen3Model"], "Qwen3ForCausalLM"),
        ("qwen3", ["Qwen3ForSequenceClassification"], "Qwen3ForSequenceClassification"),
    ],
)
def test_the_embeddings_of_a_tied_model_are_its_head(family, architectures, expected):
    """A bare model whose embeddings are tied has all that a causal one has, and what is written as one can chat."""
    config = type(ZOO[family])(**{**ZOO[family].to_dict(), "architectures": architectures})
    found = class_of(config)
    found = found if expected == found.__name__ else found._model_mapping[type(config)]
    assert found is getattr(transformers, expected)
