"""The machine that tries every class of transformers: its tiny models, its answers, ten classes."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "families"
SAMPLE = (
    "llama", "gpt2", "opt", "bitnet", "mamba", "qwen3_next", "gemma3n_text", "deepseek_v3", "mixtral", "qwen2_5_vl",
)  # fmt: skip
QUICK = ("sites", "identity", "inputs", "flat_llm", "dropped blocks", "loaded, own class", "from files")


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """Its modules, which find each other by their folder."""
    sys.path.insert(0, str(TOOL))
    import configs
    import features
    import trying

    yield type("Tool", (), {"configs": configs, "features": features.FEATURES, "trying": trying})
    sys.path.remove(str(TOOL))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """One thread: on tiny models a second one only waits, and beside other processes it waits fifty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def of(tool: Any, kind: str) -> Any:
    return next(tiny for tiny in tool.configs.every_class() if tiny.kind == kind)


def test_every_causal_class_is_tried(tool):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    assert set(NAMES.items()) <= {(tiny.kind, tiny.class_name) for tiny in tool.configs.every_class()}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bamba", "gemma3_text", "deepseek_v3", "gpt_oss", "mllama"])
def test_a_tiny_model_is_small_and_runs_and_is_the_same_each_time(tool, kind):
    tiny = of(tool, kind)
    model = tiny.make()
    assert sum(parameter.numel() for parameter in model.parameters()) < 3e6
    out = tool.trying.logits(model, tiny.tokens())
    assert torch.isfinite(out).all() and torch.equal(out, tool.trying.logits(tiny.make(), tiny.tokens()))


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("qwen3_next", {"linear_attention", "full_attention"}),
        ("gemma3_text", {"sliding_attention", "full_attention"}),
        ("lfm2", {"conv", "full_attention"}),
    ],
)
def test_hybrids_keep_all_kinds_of_blocks(tool, kind, entries):
    config = of(tool, kind).config
    found = config.layer_types
    assert len(found) == 4 and set(found) == entries


@pytest.mark.parametrize(
    ("raised", "answer"),
    [("Refused", "refused"), ("NotTried", "not tried"), ("Late", "red")],
)
def test_answers(tool, raised, answer):
    def feature(tiny: Any) -> str:
        raise getattr(tool.trying, raised)("because")

    found = tool.trying.answer(feature, of(tool, "llama"), 5)
    assert found["answer"] == answer and "because" in found["says"]


def test_a_refusal_that_changed_something_is_red(tool, monkeypatch):
    def destroying(model: Any, *_: Any) -> None:
        model.lm_head.weight.data.zero_()
        raise ValueError("no")

    monkeypatch.setattr(tool.trying, "compress", destroying)
    found = tool.trying.answer(tool.features["identity"], of(tool, "llama"), 5)
    assert found["answer"] == "red" and "something was changed" in found["says"]


def test_wrong_numbers_are_red(tool, monkeypatch):
    def halving(model: Any, *_: Any) -> None:
        model.lm_head.weight.data *= 0.5

    monkeypatch.setattr(tool.trying, "compress", halving)
    found = tool.trying.answer(tool.features["identity"], of(tool, "llama"), 5)
    assert found["answer"] == "red" and "off by" in found["says"]


@pytest.mark.parametrize("kind", SAMPLE)
def test_the_answers_are_those_of_the_page(tool, kind):
    tiny = of(tool, kind)
    rows = map(json.loads, (TOOL.parents[1] / "docs" / "families.jsonl").read_text().splitlines())
    known = {row["feature"]: row["answer"] for row in rows if row["class"] == tiny.name}
    for feature in QUICK:
        found = tool.trying.answer(tool.features[feature], tiny, 60)
        assert found["answer"] == known[feature], f"{feature}: {found['says']}"
