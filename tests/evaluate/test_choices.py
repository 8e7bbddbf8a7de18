from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from tensormix.evaluate.choices import (
    ChoicePrompt,
    accuracy_rows,
    answer_tokens,
    common_prefix,
    evaluate_choices,
    wilson,
)
from tensormix.operators import Bypass

SHARED = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
CONFIGS = {
    "llama": LlamaConfig(intermediate_size=24, max_position_embeddings=64, initializer_range=0.4, **SHARED),
    "qwen3": Qwen3Config(
        intermediate_size=24,
        max_position_embeddings=64,
        head_dim=8,
        num_key_value_heads=1,
        initializer_range=0.4,
        **SHARED,
    ),
    "gpt2": GPT2Config(n_positions=64, initializer_range=0.4, **SHARED),
    "opt": OPTConfig(ffn_dim=24, max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.4, **SHARED),
    "sliding": MistralConfig(
        intermediate_size=24,
        max_position_embeddings=64,
        sliding_window=8,
        num_key_value_heads=2,
        initializer_range=0.4,
        **SHARED,
    ),
}


def make_tokenizer(words: list[str], bos: bool = True) -> PreTrainedTokenizerFast:
    """Each word with the space before it is one token."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\S+"), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


WORDS = ["Answer:", " Answer:", " A", " B", " C", " D", *[f" w{index}" for index in range(50)]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(WORDS)


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()


def make_prompts(num: int, shots: int, seed: int = 0) -> list[ChoicePrompt]:
    """Prompts of two subjects; those of a subject begin with the same `shots` words."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> str:
        return "".join(f" w{int(word)}" for word in torch.randint(50, (count,), generator=generator))

    prefix = {"one": words(shots), "two": words(shots)}
    prompts = []
    for index in range(num):
        subject = "one" if index % 3 else "two"
        text = prefix[subject] + words(1 + int(torch.randint(9, (1,), generator=generator))) + " Answer:"
        prompts.append(ChoicePrompt(id=f"q{index}", subject=subject, text=text, gold=index % 4))
    return prompts


def one_by_one(model: nn.Module, tokenizer: Any, prompts: list[ChoicePrompt]) -> torch.Tensor:
    """Each prompt alone, without padding or cache: the four logits after it."""
    four = [WORDS.index(f" {letter}") + 2 for letter in "ABCD"]
    with torch.no_grad():
        return torch.stack(
            [model(torch.tensor([tokenizer(p.text)["input_ids"]])).logits[0, -1, four].float() for p in prompts]
        )


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("share_prefix", [False, True])
def test_batches_equal_one_prompt_at_a_time(kind: str, share_prefix: bool, tokenizer: Any) -> None:
    model = make_model(kind)
    prompts = make_prompts(11, shots=30)
    rows = evaluate_choices(model, tokenizer, prompts, batch_size=4, share_prefix=share_prefix)
    answers = [row for row in rows if row["kind"] == "answer"]
    assert [row["id"] for row in answers] == [prompt.id for prompt in prompts]
    assert [row["gold"] for row in answers] == [prompt.gold for prompt in prompts]
    truth = one_by_one(model, tokenizer, prompts)
    torch.testing.assert_close(torch.tensor([row["logits"] for row in answers]), truth, rtol=1e-4, atol=1e-5)
    assert [row["predicted"] for row in answers] == truth.argmax(1).tolist()
    assert len({tuple(row["logits"]) for row in answers}) == len(answers)


def count_tokens(model: nn.Module) -> list[int]:
    """Number of tokens that the model reads in each forward pass."""
    counts: list[int] = []

    def reads(module: nn.Module, args: Any, kwargs: Any) -> None:
        counts.append((args[0] if args else kwargs["input_ids"]).numel())

    model.register_forward_pre_hook(reads, with_kwargs=True)
    return counts


def test_a_shared_prefix_is_read_once(tokenizer: Any) -> None:
    model = make_model("llama")
    counts = count_tokens(model)
    evaluate_choices(model, tokenizer, make_prompts(24, shots=40), batch_size=8)
    shared = sum(counts)
    counts.clear()
    evaluate_choices(model, tokenizer, make_prompts(24, shots=40), batch_size=8, share_prefix=False)
    assert shared < sum(counts) / 3


@pytest.mark.parametrize("dropped", [0, 1])
def test_shared_prefix_with_a_dropped_block(dropped: int, tokenizer: Any) -> None:
    model: Any = make_model("llama")
    model.model.layers[dropped] = Bypass()
    prompts = make_prompts(7, shots=30)
    rows = evaluate_choices(model, tokenizer, prompts, batch_size=3)
    logits = torch.tensor([row["logits"] for row in rows if row["kind"] == "answer"])
    torch.testing.assert_close(logits, one_by_one(model, tokenizer, prompts), rtol=1e-4, atol=1e-5)


def test_the_head_runs_only_where_an_answer_is_read(tokenizer: Any) -> None:
    model: Any = make_model("llama")
    positions: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: positions.append(output.shape[1]))
    evaluate_choices(model, tokenizer, make_prompts(1, shots=30), batch_size=4)
    assert positions == [1]


def test_accuracy_counts_and_subjects(tokenizer: Any) -> None:
    answers = [
        {"task": "exam", "subject": subject, "predicted": predicted, "gold": gold}
        for subject, predicted, gold in [("b", 0, 0), ("a", 1, 1), ("a", 2, 1), ("b", 3, 3), ("b", 2, 2)]
    ]
    rows = {row["subject"]: row for row in accuracy_rows(answers)}
    assert list(rows) == ["all", "b", "a"]
    assert rows["all"]["value"] == 4 / 5 and rows["all"]["num_questions"] == 5
    assert rows["a"]["value"] == 1 / 2 and rows["b"]["value"] == 1
    assert all(row["kind"] == "accuracy" and row["low"] <= row["value"] <= row["high"] for row in rows.values())


def test_wilson_known_values() -> None:
    # 10 of 20 and 0 of 10, from the formula worked by hand
    assert wilson(10, 20) == pytest.approx((0.299298, 0.700702), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_solve_the_score_equation(counts: tuple[int, int]) -> None:
    right, num = counts
    low, high = wilson(right, num)
    assert 0 <= low <= right / num <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(right / num - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / num))


def test_progress_reaches_the_end(tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    prompts = make_prompts(9, shots=30)
    evaluate_choices(make_model("gpt2"), tokenizer, prompts, batch_size=2, progress=lambda *at: seen.append(at))
    assert seen[-1] == (9, 9) and [done for done, _ in seen] == sorted(done for done, _ in seen)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=2, max_size=5))
def test_common_prefix(rows: list[list[int]]) -> None:
    length = common_prefix(rows)
    assert all(row[:length] == rows[0][:length] and len(row) > length for row in rows)
    longer = length + 1
    assert any(len(row) <= longer or row[:longer] != rows[0][:longer] for row in rows)


def test_answers_must_be_one_token_each() -> None:
    assert answer_tokens(make_tokenizer(WORDS)) == [4, 5, 6, 7]
    split = make_tokenizer([word for word in WORDS if word != " C"])
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-BD]\S*| |\S+"), "isolated")
    with pytest.raises(ValueError, match=r"answer ' C' must be one token .* makes it 2: \['<unk>', '<unk>'\]"):
        answer_tokens(split)
    with pytest.raises(ValueError, match="answers ' B' and ' D' are the same token"):
        answer_tokens(make_tokenizer([word for word in WORDS if word not in (" B", " D")]))


def test_a_closing_token_of_the_tokenizer_is_left_off(tokenizer: Any) -> None:
    closing = make_tokenizer(WORDS)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <s>", special_tokens=[("<s>", 1)]
    )
    model, prompts = make_model("llama"), make_prompts(3, shots=2)
    assert evaluate_choices(model, closing, prompts, batch_size=2) == evaluate_choices(
        model, tokenizer, prompts, batch_size=2
    )


def test_long_prompts_are_counted_and_named(tokenizer: Any) -> None:
    prompts = make_prompts(4, shots=20)
    prompts[2] = ChoicePrompt(id="long", subject="one", text=" w1" * 70 + " Answer:", gold=0)
    with pytest.raises(ValueError, match=r"1 of 4 prompts are longer than the 64 tokens .* 'long' with 72 tokens"):
        evaluate_choices(make_model("llama"), tokenizer, prompts, batch_size=2)


def test_empty_set(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="the set of prompts is empty"):
        evaluate_choices(make_model("llama"), tokenizer, [], batch_size=2)


def test_nan_names_the_question(tokenizer: Any) -> None:
    model: Any = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[WORDS.index(" w3") + 2] = math.nan
    prompts = [
        ChoicePrompt(id=name, subject="s", text=text + " Answer:", gold=0)
        for name, text in (("x", " w2"), ("y", " w3"))
    ]
    with pytest.raises(ValueError, match="logits are NaN for question 'y'"):
        evaluate_choices(model, tokenizer, prompts, batch_size=2)


def test_models_whose_cache_is_cut_or_whose_head_is_fixed_are_read_in_full(tokenizer: Any) -> None:
    prompts = make_prompts(6, shots=40)
    sliding = make_model("sliding")
    counts = count_tokens(sliding)
    evaluate_choices(sliding, tokenizer, prompts, batch_size=1)
    lengths = {len(tokenizer(prompt.text)["input_ids"]) for prompt in prompts}
    assert sum(count in lengths for count in counts) == len(prompts)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model("llama")

        def forward(self, ids: torch.Tensor) -> Any:
            return self.inner(ids)

    rows = evaluate_choices(Plain(), tokenizer, prompts, batch_size=4)
    logits = torch.tensor([row["logits"] for row in rows if row["kind"] == "answer"])
    torch.testing.assert_close(logits, one_by_one(make_model("llama"), tokenizer, prompts), rtol=1e-4, atol=1e-5)
