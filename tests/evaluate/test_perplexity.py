from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tensormix.evaluate.perplexity import perplexity, windows

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


class Table(nn.Module):
    """Predicts the next token from the last one alone: logits[last]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)
        self.reads: list[list[int]] = []

    def forward(self, ids: Tensor) -> SimpleNamespace:
        self.reads += ids.tolist()
        return SimpleNamespace(logits=self.get_buffer("logits")[ids])


def naive(model: nn.Module, ids: list[int], window: int, stride: int, bos: int | None) -> tuple[float, int]:
    """Token by token: the first window that holds a token is read up to that token, one forward pass for each."""
    losses = []
    for place in range(len(ids)):
        begin = next(b for b in range(0, len(ids), stride) if b <= place < b + window)
        context = ([] if bos is None else [bos]) + ids[begin:place]
        if context:
            with torch.no_grad():
                logits = model(torch.tensor([context])).logits[0, -1].double()
            losses.append(float(logits.logsumexp(0) - logits[ids[place]]))
    return math.exp(math.fsum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (8, 1), (9, 5), (47, 47), (24, 12), (2, 2)])
def test_equals_the_token_by_token_definition(llama: nn.Module, window: int, stride: int, bos: int | None) -> None:
    window = min(window, 31)
    ids = torch.randint(31, (47,), generator=torch.Generator().manual_seed(window))
    value, count = naive(llama, ids.tolist(), window, min(stride, window), bos)
    for batch_size in (1, 3):
        row = perplexity(
            llama, ids, window=window, stride=min(stride, window), text="t", bos_id=bos, batch_size=batch_size
        )
        assert row["value"] == pytest.approx(value, rel=1e-5)
        assert row["num_tokens"] == count
    assert row["kind"] == "perplexity" and row["dtype"] == "float32" and row["bos"] is (bos is not None)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(2, 12), st.integers(1, 12), st.booleans())
def test_windows_score_every_token_once(num_tokens: int, window: int, stride: int, bos: bool) -> None:
    stride = min(stride, window)
    spans = windows(num_tokens, window, stride, bos)
    scored = [token for _, first, end in spans for token in range(first, end)]
    assert len(set(scored)) == len(scored)
    without_context = set() if bos else set(range(0, num_tokens, stride)) if stride == window else {0}
    assert set(scored) == set(range(num_tokens)) - without_context
    assert all(end - begin <= window and begin % stride == 0 for begin, _, end in spans)


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    row = perplexity(Table(torch.zeros(50, 50)), torch.arange(50), window=10, stride=5, text="t")
    assert row["value"] == pytest.approx(50, rel=1e-6)
    assert row["num_tokens"] == 49


def test_known_answers() -> None:
    # after 0 comes 1 with probability 1/2, after 1 comes 0 with probability 1/8
    table = Table(torch.tensor([[0.5, 0.5], [0.125, 0.875]]).log())
    ids = torch.tensor([0, 1, 0, 1, 0])
    row = perplexity(table, ids, window=5, stride=5, text="t")
    assert row["value"] == pytest.approx(math.sqrt(2 * 8), rel=1e-6)
    sure = Table(torch.eye(7).roll(1, dims=1) * 1e4)  # always right
    assert perplexity(sure, torch.arange(7), window=7, stride=7, text="t")["value"] == 1.0


def test_bos_stands_in_front_of_each_window_and_packed_text_is_left_alone() -> None:
    table = Table(torch.zeros(9, 9))
    perplexity(table, torch.arange(2, 8), window=3, stride=3, text="t", bos_id=1)
    assert table.reads == [[1, 2, 3, 4], [1, 5, 6, 7]]
    table.reads.clear()
    perplexity(table, torch.arange(2, 8), window=3, stride=3, text="t")
    assert table.reads == [[2, 3, 4], [5, 6, 7]]


def test_a_hopeless_model_is_infinitely_perplexed_but_keeps_its_loss() -> None:
    wrong = Table(torch.eye(7) * 1e4)
    row = perplexity(wrong, torch.arange(7), window=7, stride=7, text="t")
    assert row["value"] == math.inf and row["loss"] == pytest.approx(1e4)


def test_training_mode_is_given_back(llama: LlamaForCausalLM) -> None:
    llama.train()
    llama.model.norm.eval()
    perplexity(llama, torch.arange(20), window=10, stride=10, text="t")
    assert llama.training and llama.lm_head.training and not llama.model.norm.training
    llama.eval()


def test_bfloat16_is_said_in_the_row(llama: LlamaForCausalLM) -> None:
    half = LlamaForCausalLM(llama.config).bfloat16()
    assert perplexity(half, torch.arange(20), window=10, stride=10, text="t")["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("num_tokens", "window", "stride", "bos", "message"),
    [
        (0, 8, 8, None, "'wiki': the text is empty"),
        (5, 8, 8, None, "has 5 tokens, fewer than one window of 8; the largest usable window is 5"),
        (50, 33, 33, None, "window of 33 tokens is longer than the 32 .* largest usable window is 32"),
        (50, 32, 32, 1, "32 tokens and the BOS in front of it is longer than the 32 .* usable window is 31"),
        (20, 40, 40, None, "longer than the 32 .* largest usable window is 20"),
        (50, 8, 9, None, r"stride must be in 1\.\.8 \(the window\), got 9"),
        (50, 8, 0, None, "got 0"),
        (50, 1, 1, None, "window must be at least 2"),
    ],
)
def test_errors(llama: nn.Module, num_tokens: int, window: int, stride: int, bos: int | None, message: str) -> None:
    ids = torch.zeros(num_tokens, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        perplexity(llama, ids, window=window, stride=stride, text="wiki", bos_id=bos)


def test_nan_names_the_window() -> None:
    logits = torch.zeros(9, 9)
    logits[5] = math.nan
    with pytest.raises(ValueError, match=r"'t': the model's logits are NaN in the window of tokens 4 to 5 of"):
        perplexity(Table(logits), torch.tensor([0, 1, 2, 3, 5, 6, 7, 8]), window=2, stride=2, text="t", batch_size=2)


def test_a_real_model_on_real_stories() -> None:
    """The first 200 stories give 4.69; the whole file, which takes half a minute, gives 4.47."""
    if not (DATA / "models" / "stories260K").is_dir():
        pytest.skip(f"the stories260K model and its text are not in {DATA}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DATA / "models" / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "models" / "stories260K")
    stories = json.loads((DATA / "text" / "tinystories_1000.json").read_text())[:200]
    ids = [
        token for story in stories for token in [1, *tokenizer(story.strip(), add_special_tokens=False)["input_ids"]]
    ]
    row = perplexity(model, torch.tensor(ids), window=512, stride=512, text="stories", batch_size=16)
    assert row["value"] == pytest.approx(4.69, rel=0.01)
    assert row["num_tokens"] == 81_044
