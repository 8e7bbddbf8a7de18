"""The training script of the embedded model: its data, its targets, its starting circuit."""

from pathlib import Path

import connecting
import pytest
import tokenizer
import torch
import train
import wiring

STUDY = Path(__file__).parent


@pytest.fixture(scope="module")
def words():
    return tokenizer.make_tokenizer(1024)


def test_the_tokenizer_keeps_marks_and_answers_whole(words):
    assert words.tokenize("?\nA. 7\nB. cat\nAnswer: B") == ["?", "ĊA.", "Ġ7", "ĊB.", "Ġcat", "ĊAnswer:", "ĠB"]
    assert words.decode(words.encode("any text: ü, 本\n"), skip_special_tokens=True) == "any text: ü, 本\n"


def test_a_step_reads_the_same_windows_every_time(words):
    for step in (0, 5000):
        first, again = (train.step_windows(words, step) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(train.step_windows(words, 0)[0], train.step_windows(words, 1)[0])


def test_the_answer_in_words_is_the_marked_choice(words):
    text = "What?\nA. cat\nB. dog\nC. red\nD. blue\nAnswer: C\n\nWho?\nA. 1\nB. 2\nC. 3\nD. 4\nSolution: 2, choice B"
    ids = torch.tensor([words.encode(text)])
    found = train.answers_in_words(words, ids)[0]
    targets = [words.decode([token]) for token in found[found != -100].tolist()]
    assert targets == [" red", " 2"]
    assert [words.decode([t]) for t in ids[0][found != -100].tolist()] == ["\nAnswer:", "\nSolution:"]


def test_the_first_block_starts_by_looking_one_and_two_places_back(words):
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(**train.CONFIG, vocab_size=len(words))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    mark, answer, solution = words.convert_tokens_to_ids(["?", "ĊAnswer:", "ĊSolution:"])
    pairs = [tuple(words.convert_tokens_to_ids([f"Ċ{x}.", f"Ġ{x}"])) for x in "ABCD"]
    wiring.wire(model, mark, [answer, solution], pairs)
    with torch.no_grad():
        attention = model(torch.randint(1, 1000, (1, 40)), output_attentions=True).attentions[0][0]
    for head, back in enumerate((1, 2)):
        assert attention[head].diagonal(-back)[5:].min() > 0.9


def test_ridge_finds_the_map_that_made_the_data():
    torch.manual_seed(0)
    inputs, truth = torch.randn(500, 8), torch.randn(3, 8)
    found = connecting.ridge(inputs, inputs @ truth.T, torch.ones(500))
    torch.testing.assert_close(found, truth, rtol=1e-2, atol=1e-2)
