"""SliceGPT: turned, the model is the same; sliced, it loses what the stream holds outside its principal components."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import tensormix.hf  # noqa: F401
from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.methods import SliceGpt
from tensormix.methods.slice_gpt import principal_basis
from tensormix.models import load_model
from tensormix.operators import SlicedBlock, SlicedNorm
from tensormix.plan import Plan
from tensormix.run.check import counts, replace_empty
from tensormix.sites import blocks, find_sites
from tensormix.sites.sliced import width_of
from tensormix.storage.bits import stored_bits
from zoo import logits, make, token_ids

BATCHES = [token_ids(rows=6, length=10, seed=seed) for seed in range(2)]
FAMILIES = ["llama", "mistral", "phi3", "qwen2", "qwen3"]  # qwen3 is tied, qwen2 has biases


def plan(keep_channels, **more):
    return Plan.model_validate([{"method": {"name": "slice_gpt", "keep_channels": keep_channels, **more}}])


def narrow(family, rank, seed=0):
    """A model whose residual stream never leaves a random subspace of `rank` dimensions."""
    model = make(family, seed).double()
    inside = torch.linalg.qr(torch.randn(32, rank, dtype=torch.float64)).Q
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding @ inside @ inside.T)
        for site in find_sites(model):
            if site.role in ("o", "down"):
                site.module.weight.copy_(inside @ inside.T @ site.weight)
                if site.bias is not None:
                    site.module.bias.copy_(inside @ inside.T @ site.bias)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_channels_the_model_is_the_same(family):
    """Norms round to float32 whatever the dtype of the model: the logits agree to that."""
    model = make(family, attention_bias=True).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2)  # scales that are all 1 would hide a lost one
    dense = logits(model)
    compress(model, plan(1.0), BATCHES)
    assert width_of(model) == 32 and all(isinstance(block, SlicedBlock) for block in blocks(model))
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("inputs", ["propagated", "dense"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_stream_of_few_dimensions_is_sliced_to_them_without_loss(family, inputs):
    model = narrow(family, 16)
    dense = logits(model)
    compress(model, plan(0.5), BATCHES, inputs=inputs)
    assert width_of(model) == 16
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=2e-5)


def test_one_channel_less_than_the_stream_needs_loses_something():
    model = narrow("llama", 16)
    dense = logits(model)
    compress(model, plan(15 / 32, multiple=1), BATCHES)
    assert width_of(model) == 15 and float((logits(model) - dense).norm() / dense.norm()) > 1e-3


def test_the_basis_reaches_the_known_optimum():
    torch.manual_seed(0)
    stream = torch.randn(50, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    for width in (1, 5, 12):
        basis = principal_basis(stream.T @ stream, width)
        lost = (stream - stream @ basis @ basis.T).norm()
        torch.testing.assert_close(lost, torch.linalg.svdvals(stream)[width:].norm(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_streamed_reloaded_and_compressed_further(family, tmp_path):
    make(family).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    model = load_model(tmp_path / "dense")
    expected = compress(model, plan(0.75), BATCHES)
    rows = compress_checkpoint(tmp_path / "dense", tmp_path / "out", plan(0.75), BATCHES)
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in expected]
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()) and (tmp_path / "out" / "tokenizer.json").exists()
    assert torch.equal(logits(again), logits(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["sliced"] == 24 and not config["tie_word_embeddings"]
    with pytest.raises(ValueError, match="exists already"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", plan(0.75), BATCHES)
    further = Plan.model_validate([{"blocks": 1, "sites": ["q", "down"], "method": {"name": "svd_llm", "keep": 0.5}}])
    compress(again, further, BATCHES)
    compress_checkpoint(tmp_path / "out", tmp_path / "further", further, BATCHES)
    assert torch.equal(logits(load_model(tmp_path / "further")), logits(again))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_sliced_model_is_read_as_its_bare_model_but_not_under_another_head(family, tmp_path):
    model = make(family)
    compress(model, plan(0.75), BATCHES)
    model.save_pretrained(tmp_path / "out")
    bare, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    wanted = model.model(BATCHES[0])[0]
    assert not report["missing_keys"] and torch.equal(bare.eval()(BATCHES[0])[0], wanted)
    bare.save_pretrained(tmp_path / "bare")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "bare").eval()(BATCHES[0])[0], wanted)
    with pytest.raises(ValueError, match=r"ForSequenceClassification has a head that reads all of it.*AutoModel"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_the_count_of_llama_2_7b_is_honest():
    """Keeping 75 % of the channels saves 16 % of the parameters: there are two shortcuts of 3072 x 3072 in a block."""
    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense = stored_bits(model)
    rows = replace_empty(model, plan(0.75))
    shortcuts = 64 * 3072**2
    blocks_left = 32 * (4 * 4096 * 3072 + 3 * 11008 * 3072)
    expected = blocks_left + shortcuts + 2 * 32000 * 3072
    assert stored_bits(model) == 16 * expected == sum(row["bits"] for row in rows)
    assert expected == 5_657_591_808 and round(1 - expected * 16 / dense, 3) == 0.16
    assert counts(model)["macs_per_token"] == expected - 32000 * 3072  # all but the embedding
    assert sum(row["dense_bits"] for row in rows) == dense - 16 * 4096  # all but the final norm


def test_check_foresees_and_rows_add_up():
    model, empty = make("qwen3"), make("qwen3")
    dense = stored_bits(model)
    foreseen = replace_empty(empty, plan(0.75))
    rows = compress(model, plan(0.75), BATCHES)
    for row, ahead in zip(rows, foreseen, strict=True):
        assert all(row[key] == ahead[key] for key in ("site", "operator", "parameters", "macs_per_token"))
    assert counts(model) == counts(empty)
    assert sum(row["bits"] for row in rows) == stored_bits(model)
    assert sum(row["dense_bits"] for row in rows) == dense - 32 * 32  # tied: the head counts once
    assert [row["block"] for row in rows] == [0, 1, 2, 3, None, None]
    assert rows[-1]["dense_parameters"] == 0 < rows[-1]["parameters"]


def test_generation_hidden_states_and_training():
    model = make("llama")
    compress(model, plan(0.75), BATCHES)
    ids, options = token_ids(rows=1, seed=4), {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    assert [h.shape[-1] for h in model(ids, output_hidden_states=True).hidden_states] == [24] * 5
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in blocks(model)[0].parameters())


def test_fewer_tokens_than_channels_and_bfloat16():
    model = make("llama").to(torch.bfloat16)
    compress(model, plan(0.75), [token_ids(rows=1, length=5)])
    assert logits(model).isfinite().all() and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_norm_is_that_of_the_full_stream():
    torch.manual_seed(0)
    full = torch.randn(3, 32)
    full[:, 24:] = 0
    expected = full / (full.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(SlicedNorm(32, 1e-5)(full[:, :24]), expected[:, :24])


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("gpt2", r"transformer\.h\.0 is a GPT2Block: slice_gpt turns the residual stream of .*Qwen3DecoderLayer"),
        ("gemma2", r"model\.layers\.0 is a Gemma2DecoderLayer: slice_gpt turns"),
        ("gptj", r"is a GPTJBlock: .* other models change if it is turned"),
    ],
)
def test_other_models_are_refused(family, sentence):
    with pytest.raises(ValueError, match=sentence):
        compress(make(family), plan(0.75), BATCHES)
    with pytest.raises(ValueError, match=sentence):
        replace_empty(make(family), plan(0.75))


def test_what_is_refused_leaves_the_model_as_it_was():
    model = make("llama")
    dense = logits(model)
    with pytest.raises(ValueError, match=r"keep_channels=0\.01 leaves none of 32 channels; .* 0\.2500 \(8 channels\)"):
        compress(model, plan(0.01), BATCHES)
    with pytest.raises(ValueError, match=r"slice_gpt needs calibration batches \(Gram\), but none were given"):
        compress(model, plan(0.75))
    with pytest.raises(ValueError, match=r"there are no calibration batches"):
        compress(model, plan(0.75), [])
    broken = copy.deepcopy(model)
    blocks(broken)[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.3, before its attention: the calibration inputs hold NaN"):
        compress(broken, plan(0.75), BATCHES)
    assert width_of(broken) is None
    model.get_input_embeddings().weight.data.zero_()
    with pytest.raises(
        ValueError, match=r"model\.layers\.0, before its attention: the calibration inputs are all zero"
    ):
        compress(model, plan(0.75), BATCHES)
    assert not torch.equal(logits(broken), dense) and width_of(model) is None


def test_it_comes_first_and_once():
    model = make("llama")
    compress(model, Plan.model_validate([{"blocks": 1, "sites": ["q"], "method": {"name": "svd", "keep": 0.5}}]))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj is a LowRank already; .* so it comes first"):
        compress(model, plan(0.75), BATCHES)
    sliced = make("llama")
    compress(sliced, plan(0.75), BATCHES)
    with pytest.raises(ValueError, match="is a SlicedBlock: slice_gpt turns"):
        compress(sliced, plan(0.75), BATCHES)
    with pytest.raises(ValueError, match="the residual stream is sliced: this model has no dense form"):
        sliced.dequantize()
    with pytest.raises(ValueError, match="matches no site"):  # a block left out would miss its change of channels
        compress(sliced, Plan.model_validate([{"blocks": 1, "method": {"name": "drop_blocks"}}]))


@pytest.mark.parametrize("rule", [{"blocks": "last 2"}, {"sites": ["q"]}])
def test_a_plan_that_does_not_cover_the_model(rule):
    method = {"name": "slice_gpt", "keep_channels": 0.5}
    with pytest.raises(
        ValidationError, match=r"slice_gpt (changes the whole model: it must be the only|works on whole)"
    ):
        Plan.model_validate([{"method": method, **rule}])
    with pytest.raises(ValidationError, match="must be the only rule of its plan, with blocks 'all'"):
        Plan.model_validate([{"method": method}, {"method": {"name": "zero"}}])


def test_the_method_itself():
    assert SliceGpt(keep_channels=0.75).width(4096) == 3072 and SliceGpt(keep_channels=0.76).width(64) == 48
    assert SliceGpt(keep_channels=1.0).width(30) == 30
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        SliceGpt(keep_channels=1.5)
