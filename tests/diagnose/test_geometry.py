from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen3Config

from tensormix.diagnose import DIAGNOSTICS, diagnose
from tensormix.diagnose.geometry import (
    drift_map,
    drift_rows,
    first_late_layer,
    geometry_rows,
    last_states,
    similarity_map,
    similarity_rows,
)
from tensormix.evaluate import ChoicePrompt
from tensormix.operators import Bypass

SHARED = {"vocab_size": 64, "num_attention_heads": 2, "hidden_size": 16}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(num_hidden_layers=4, intermediate_size=24, initializer_range=0.3, **SHARED),
    "qwen3": Qwen3Config(
        num_hidden_layers=4, intermediate_size=24, head_dim=8, num_key_value_heads=2, initializer_range=0.3, **SHARED
    ),
    "gpt2": GPT2Config(n_layer=4, n_positions=64, initializer_range=0.3, vocab_size=64, n_head=2, n_embd=16),
    "opt": OPTConfig(num_hidden_layers=4, ffn_dim=24, word_embed_proj_dim=16, init_std=0.3, **SHARED),
}
PROMPTS = [
    ChoicePrompt(
        id=f"q{index}", subject="s", text=" ".join(str(5 + (7 * index + k) % 50) for k in range(3 + index)), gold=0
    )
    for index in range(7)
]
ANSWERS = [{"kind": "answer", "id": "q", "logits": [0.0] * 4, "predicted": 0}, {"kind": "accuracy", "value": 1.0}]


class Numbers:
    """A tokenizer whose texts are token ids as words."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def make_model(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()


def rotated(angles: list[float], num_prompts: int = 5, width: int = 6) -> Tensor:  # (P, L + 1, D)
    """Streams that lie at known angles in a plane of their own for each prompt, with lengths that must not matter."""
    generator = torch.Generator().manual_seed(2)
    planes = torch.linalg.qr(torch.randn(num_prompts, width, 2, generator=generator, dtype=torch.float64)).Q
    turns = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles], dtype=torch.float64)
    lengths = torch.rand(num_prompts, len(angles), 1, generator=generator, dtype=torch.float64) * 100 + 0.01
    return lengths * torch.einsum("pdk,lk->pld", planes, turns)


def test_similarity_of_rotated_streams_is_the_cosine_of_the_angle() -> None:
    angles = [0.0, 0.3, 1.0, 2.5]
    similarity = similarity_map(rotated(angles))
    expected = torch.tensor([[math.cos(a - b) for b in angles] for a in angles], dtype=torch.float64)
    torch.testing.assert_close(similarity, expected, rtol=0, atol=1e-12)


def test_similarity_is_a_mean_of_cosines_not_a_cosine_of_means() -> None:
    states = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 9.0], [9.0, 0.0]]])
    assert similarity_map(states)[0, 1] == pytest.approx(0.5)
    assert similarity_map(torch.zeros(1, 2, 3))[0, 1] == 0


def test_drift_of_known_angles() -> None:
    dense, turned = [0.0, 0.2, 0.5, 0.9], [0.0, 0.2, 0.9, 0.4]
    rows = similarity_rows(similarity_map(rotated(turned)))
    drift = drift_map(rows, similarity_rows(similarity_map(rotated(dense))))
    by_pair = {(row["layer"], row["other"]): row["value"] for row in drift_rows(drift) if row["kind"] == "drift"}
    expected = {
        (a, b): abs(math.cos(turned[a] - turned[b]) - math.cos(dense[a] - dense[b]))
        for a in range(4)
        for b in range(a + 1, 4)
    }
    assert by_pair == pytest.approx(expected, abs=1e-12)
    profile = {row["layer"]: row["value"] for row in drift_rows(drift) if row["kind"] == "drift_profile"}
    assert profile == pytest.approx(
        {a: sum(expected[a, b] for b in range(a + 1, 4)) / (3 - a) for a in range(3)}, abs=1e-12
    )
    means = {row["region"]: row["value"] for row in drift_rows(drift) if row["kind"] == "drift_mean"}
    assert means == pytest.approx({"all": sum(expected.values()) / 6, "output": expected[2, 3]}, abs=1e-12)


@pytest.mark.parametrize(("num_blocks", "first"), [(1, 0), (2, 1), (5, 4), (6, 4), (32, 22), (36, 24)])
def test_output_side_is_the_last_third(num_blocks: int, first: int) -> None:
    assert first_late_layer(num_blocks) == first
    drift = torch.zeros(num_blocks + 1, num_blocks + 1)
    drift[first:, first:] = 1
    means = {row["region"]: row["value"] for row in drift_rows(drift) if row["kind"] == "drift_mean"}
    assert means["output"] == 1 and (first == 0 or means["all"] < 1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_states_are_the_residual_stream_before_the_final_norm(kind: str) -> None:
    model = make_model(kind)
    states = last_states(model, Numbers(), PROMPTS, batch_size=3)
    assert states.shape == (7, 5, 16)
    for index, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            ids = torch.tensor([[int(word) for word in prompt.text.split()]])
            hidden = model(ids, output_hidden_states=True).hidden_states
        own = torch.stack([layer[0, -1] for layer in hidden])
        torch.testing.assert_close(states[index, :-1], own[:-1], rtol=1e-4, atol=1e-5)
        norm = {"gpt2": "transformer.ln_f", "opt": "model.decoder.final_layer_norm"}.get(kind, "model.norm")
        with torch.no_grad():
            normed = model.get_submodule(norm)(states[index, -1])
        torch.testing.assert_close(normed, own[-1], rtol=1e-4, atol=1e-5)


def test_a_dropped_block_repeats_its_layer() -> None:
    model = make_model()
    reference = geometry_rows(model, Numbers(), PROMPTS)
    model.model.layers[2] = Bypass()
    states = last_states(model, Numbers(), PROMPTS)
    assert torch.equal(states[:, 2], states[:, 3])
    rows = geometry_rows(model, Numbers(), PROMPTS, reference_rows=reference)
    pairs = {(row["layer"], row["other"]): row["value"] for row in rows if row["kind"] == "similarity"}
    assert len(pairs) == 10 and pairs[2, 3] == pytest.approx(1)
    drift = {(row["layer"], row["other"]): row["value"] for row in rows if row["kind"] == "drift"}
    assert drift[0, 1] == drift[0, 2] == drift[1, 2] == 0  # nothing before the dropped block has changed
    assert all(drift[layer, 3] > 1e-3 for layer in range(3))


def test_hooks_are_gone_and_batches_do_not_matter() -> None:
    model = make_model()
    one, all_at_once = (last_states(model, Numbers(), PROMPTS, batch_size=size) for size in (1, 50))
    torch.testing.assert_close(one, all_at_once, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_stage() -> None:
    model = make_model()
    dense = diagnose(model, Numbers(), PROMPTS, ANSWERS)
    kinds = [row["kind"] for row in dense]
    assert kinds[:2] == ["output_entropy", "prediction_entropy"] and set(kinds[2:]) == {"prompts", "similarity"}
    seen: list[tuple[int, int]] = []
    again = diagnose(
        model, Numbers(), PROMPTS, ANSWERS, reference_rows=dense, batch_size=2, progress=lambda *at: seen.append(at)
    )
    assert seen[-1] == (7, 7)
    assert all(row["value"] < 1e-6 for row in again if row["kind"].startswith("drift"))
    assert {row["region"] for row in again if row["kind"] == "drift_mean"} == {"all", "output"}
    assert all(function.__doc__ for function in DIAGNOSTICS.values())


def test_errors() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="the set of prompts is empty"):
        last_states(model, Numbers(), [])
    rows = geometry_rows(model, Numbers(), PROMPTS)
    with pytest.raises(ValueError, match="the dense reference has no similarity rows; run its diagnose stage first"):
        drift_map(rows, [])
    with pytest.raises(ValueError, match="this model has 4 blocks and the dense reference 3"):
        drift_map(rows, similarity_rows(torch.eye(4)))
    with pytest.raises(ValueError, match="taken on different prompts"):
        drift_map(rows, geometry_rows(model, Numbers(), PROMPTS[:3]))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="hidden state of layer 3 is not finite for prompt 'q0'"):
        last_states(model, Numbers(), PROMPTS)
