"""Batches as people have them: whatever their form, the same token ids, and no padding among them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, BatchEncoding, LlamaConfig

from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.models import load_model, load_tokenizer
from tensormix.sites.batches import batches_of
from tensormix.statistics import Gram
from zoo import make

LENGTHS = (12, 7, 7, 9, 1)
SVD = {"method": {"name": "svd_llm", "keep": 0.5}}


def tiny_llama(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4, **changes)).eval()


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]


def padded(sequences, side, pad=0):
    """As a tokenizer pads: ids and mask (B, T), the padding on one side or, "both", on either."""
    longest = max(map(len, sequences)) + 2
    ids, mask = torch.full((len(sequences), longest), pad), torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        first = {"right": 0, "left": longest - len(sequence), "both": 1}[side]
        ids[row, first : first + len(sequence)] = sequence
        mask[row, first : first + len(sequence)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def flat(batches):
    return [row.tolist() for batch in batches or () for row in batch]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_of_padded_batches_the_sequences_remain(llama, sequences, side):
    batch = padded(sequences, side)
    for given in (batch, [batch], BatchEncoding(batch), [{k: v.tolist() for k, v in batch.items()}]):
        assert flat(batches_of(llama, given)) == [sequence.tolist() for sequence in sequences]


def test_whole_batches_stay_as_they_are(llama):
    ids = torch.randint(3, 64, (4, 6))
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for given in (
        [ids],
        [whole],
        whole,
        DataLoader(TensorDataset(ids), batch_size=4),
        [ids.tolist()],
        (ids for _ in "a"),
    ):
        (batch,) = list(batches_of(llama, given))
        assert torch.equal(batch, ids)
    assert [batch.shape for batch in batches_of(llama, ids)] == [(1, 6)] * 4  # not all at once in memory
    for rows in (ids.tolist(), [{"input_ids": row} for row in ids], [{"input_ids": row} for row in ids.tolist()]):
        assert flat(batches_of(llama, rows)) == ids.tolist()
    assert batches_of(llama, None) is None


def test_strings_are_tokenised_one_by_one(tiny):
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    expected = [tokenizer(text)["input_ids"] for text in ("up and down", "so")]
    assert flat(batches_of(model, ["up and down", "so"], tokenizer)) == expected
    assert flat(batches_of(model, [["up and down", "so"]], tokenizer)) == expected
    assert flat(batches_of(model, "up and down", tokenizer)) == expected[:1]


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        (torch.arange(5), r"token ids of shape \(B, T\), got torch\.int64 \(5,\)"),
        ([torch.arange(5)], r"token ids of shape \(B, T\), got torch\.int64 \(5,\)"),
        ([1, 2, 3], r"token ids of shape \(B, T\), got torch\.int64 \(\)"),
        ([torch.rand(2, 5)], r"token ids of shape \(B, T\), got torch\.float32 \(2, 5\)"),
        ([torch.ones(2, 5, dtype=torch.bool)], r"got torch\.bool"),
        (7, r"got int"),
        ([None], r"got NoneType"),
        ("text", r"got a string; tokenise it, or say tokenizer="),
        ([["a", "b"]], r"got a string; tokenise it"),
        ([{"ids": [1]}], r"a dict without input_ids \(it has: ids\)"),
        ([{"input_ids": torch.ones(1, 3).long(), "pixel_values": torch.ones(1, 3)}], r"and this one has pixel_values"),
        ([{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)}], r"must both be \(B, T\)"),
        ([{"input_ids": [[3, 4, 5]], "attention_mask": [[1, 0, 1]]}], r"has gaps between tokens"),
        ([{"input_ids": [torch.arange(2)] * 3}], r"what a DataLoader makes of lists.*collate_fn"),
        ([torch.tensor([[3, 64]])], r"the token id 64 .* knows 0 to 63; .*resize_token_embeddings"),
        ([torch.tensor([[3, -100]])], r"the token id -100 .* has no embedding"),
        ([torch.empty(0, 4, dtype=torch.long)], r"no tokens"),
    ],
)
def test_what_is_no_batch_is_said(llama, batches, sentence):
    with pytest.raises(ValueError, match=sentence):
        list(batches_of(llama, batches))


def test_a_sequence_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match=r"9 tokens in a row, and the model has 8 positions.*at most 8"):
        list(batches_of(tiny_llama(max_position_embeddings=8), torch.ones(1, 9).long()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_statistics_of_padded_batches_are_those_of_the_real_tokens(llama, sequences, side):
    """The oracle is the model that gets the padded batch with its mask and its positions."""
    batch, site = padded(sequences, side), llama.model.layers[1].mlp.down_proj
    grams = {name: Gram(site.in_features) for name in ("masked", "ours")}
    mask = batch["attention_mask"]

    def watched(name, real, *args, **kwargs):
        with torch.no_grad():
            handle = site.register_forward_pre_hook(lambda _, inputs: grams[name].update(inputs[0][real]))
            llama(*args, **kwargs)
            handle.remove()

    positions = (mask.cumsum(1) - 1).clamp(min=0)
    watched("masked", mask.bool(), batch["input_ids"], attention_mask=mask, position_ids=positions)
    for ids in batches_of(llama, batch) or ():
        watched("ours", torch.ones_like(ids).bool(), ids)
    assert grams["ours"].num_tokens == grams["masked"].num_tokens == sum(LENGTHS)
    torch.testing.assert_close(grams["ours"].sum, grams["masked"].sum, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_is_compressed_the_same_with_padding_and_without(tmp_path, kind):
    """In memory and streamed, whatever stands in the padding."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 60, (length,), generator=generator)[None] for length in (12, 9, 7, 8)]
    found = []
    make(kind).save_pretrained(tmp_path / "dense")
    left, right = padded([row[0] for row in ids[:2]], "left"), padded([row[0] for row in ids[2:]], "right", pad=5)
    for number, batches in enumerate((ids, [left, right])):
        model = make(kind)
        compress(model, SVD, batches)
        compress_checkpoint(tmp_path / "dense", tmp_path / f"{number}", [SVD], iter(batches))
        streamed = AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}")
        found += [model.state_dict(), streamed.state_dict()]
    for state in found[1:]:
        assert state.keys() == found[0].keys()
        assert all(torch.equal(state[name], found[0][name]) for name in state)
