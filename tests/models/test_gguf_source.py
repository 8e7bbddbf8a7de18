"""A GGUF file is a model by itself: its config, its tokenizer and its chat template go where it goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gguf_files import TOKENIZER, TOKENS, tiny, write
from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.models import ModelSource, fingerprint, load_model, load_tokenizer, skeleton
from tensormix.plan import Plan
from tensormix.recipe import Recipe
from tensormix.run.check import check

PLAN = Plan.model_validate([{"blocks": "1", "method": {"name": "svd", "keep": 0.5}}])
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
CHAT = [{"role": "user", "content": "the"}]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "in").mkdir()
    write(tiny("llama"), tmp_path / "in" / "model-Q8_0.gguf", "llama", "Q8_0")
    return tmp_path / "in" / "model-Q8_0.gguf"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
@pytest.mark.parametrize("family", ["llama", "qwen2moe", "gpt2"])
def test_from_file_to_folder_as_in_memory_and_as_from_a_folder_of_floats(family, kind, tmp_path):
    """To the bit: streamed from the file, loaded from it, and streamed from what it holds as safetensors."""
    (tmp_path / "in").mkdir()
    write(tiny(family), tmp_path / "in" / "m.gguf", family, kind)
    dense = load_model(tmp_path / "in")
    dense.save_pretrained(tmp_path / "floats")
    rows = compress_checkpoint(tmp_path / "in" / "m.gguf", tmp_path / "out", PLAN)
    compress_checkpoint(tmp_path / "floats", tmp_path / "expected", PLAN)
    compress(dense, PLAN)
    streamed, expected = load_model(tmp_path / "out"), load_model(tmp_path / "expected")
    for model in (expected, dense):
        tensors = streamed.state_dict()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    files = sorted(file.name for file in (tmp_path / "expected").glob("*.safetensors"))
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes() for name in files)
    assert sum(row["dense_bits"] for row in rows) < 64 * sum(row["parameters"] for row in rows)


def test_a_compressed_folder_answers_a_chat(file, tmp_path):
    (file.parent / "notes.txt").write_text("nothing of the model's")
    compress_checkpoint(file, tmp_path / "out", PLAN)
    names = {found.name for found in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    assert "notes.txt" not in names and not any(name.endswith(".gguf") for name in names)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template(CHAT, return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[1, TOKENS.index("th"), TOKENS.index("e"), 2]]
    assert model.generation_config.eos_token_id == [2, 0], "the end of a text, and that of a turn"
    assert model.generate(ids, max_new_tokens=2).shape[1] > 4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        config["architectures"] == ["LlamaForCausalLM"] and config["quantization_config"]["quant_method"] == "tensormix"
    )


def test_its_tokenizer_is_that_of_the_file(file):
    tokenizer = load_tokenizer(file)
    assert len(tokenizer) == 64 and tokenizer("the")["input_ids"][-2:] == [TOKENS.index("th"), TOKENS.index("e")]
    assert tokenizer.chat_template.startswith("{% for m in messages %}")


def test_no_tokenizer_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("gguf_files.TOKENIZER", {"ggml.model": "none"})
    write(tiny("qwen2"), tmp_path / "m.gguf", "qwen2")
    with pytest.raises(ValueError, match=r"m.gguf has no tokenizer \(no tokenizer.json\)"):
        load_tokenizer(tmp_path)
    compress_checkpoint(tmp_path, tmp_path / "out", PLAN)
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_a_tokenizer_of_an_unknown_kind_is_said_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr("gguf_files.TOKENIZER", {"ggml.model": "runes", "ggml.tokens": ["a"]})
    write(tiny("qwen2"), tmp_path / "m.gguf", "qwen2")
    with pytest.raises(ValueError, match="runes"):
        compress_checkpoint(tmp_path, tmp_path / "out", PLAN)
    assert not (tmp_path / "out").exists()


def test_a_way_to_cut_words_that_is_not_known_is_said(file, tmp_path, monkeypatch):
    monkeypatch.setitem(TOKENIZER, "ggml.pre", "stablelm2")
    load_tokenizer(file).save_pretrained(tmp_path / "of_the_original")
    write(tiny("llama"), file, "llama")
    with pytest.raises(ValueError, match=r"the way of 'stablelm2', which is not known here.*name their folder"):
        load_tokenizer(file)
    shutil.copy(tmp_path / "of_the_original" / "tokenizer.json", file.parent)
    assert len(load_tokenizer(file.parent)) == 64
    compress_checkpoint(file.parent, tmp_path / "out", PLAN)
    assert len(load_tokenizer(tmp_path / "out")) == 64


def test_checking_reads_headers_only(file, monkeypatch):
    recipe = Recipe.model_validate({"model": str(file), "plan": PLAN.model_dump()})
    monkeypatch.setattr("tensormix.storage.gguf.values_of", lambda *_: pytest.fail("a tensor was read"))
    found = check(recipe)
    assert found["dense"]["parameters"] == sum(p.numel() for p in skeleton(file).parameters())
    assert found["compressed"]["parameters"] < found["dense"]["parameters"]


def test_one_of_several_has_to_be_named(file):
    shutil.copy(file, file.with_name("model-Q4_0.gguf"))
    with pytest.raises(ValueError, match=r"holds several models as GGUF \(model-Q4_0.gguf, model-Q8_0.gguf\); name"):
        ModelSource(file.parent)
    assert fingerprint(file) != fingerprint(file.with_name("model-Q4_0.gguf"))
    assert load_model(file).config.model_type == "llama"


def test_a_config_beside_it_is_the_models_own(file, tmp_path):
    config = skeleton(file).config
    config.dtype, config.rms_norm_eps = torch.bfloat16, 1e-3
    config.save_pretrained(file.parent)
    (file.parent / "notes.txt").write_text("beside")
    model = load_model(file.parent)
    assert model.dtype == torch.bfloat16 and model.config.rms_norm_eps == 1e-3
    compress_checkpoint(file, tmp_path / "out", PLAN)
    assert (tmp_path / "out" / "notes.txt").exists(), "the folder is the model's then"
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


def test_a_config_of_another_model_beside_it(file):
    config = {"model_type": "qwen2", "hidden_size": 32}
    (file.parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json describes a qwen2, and model-Q8_0.gguf holds a llama"):
        load_model(file)


def test_safetensors_go_before_it(file):
    other = tiny("qwen2")
    other.save_pretrained(file.parent)
    assert load_model(file.parent).config.model_type == "qwen2"


def repository(file: Path, root: Path) -> Path:
    """A cache of the Hub as it is on a disk: one revision, its files links to where they lie."""
    folder = root / "models--owner--name"
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    shutil.copy(file, folder / "blobs" / "0123")
    (folder / "snapshots" / "abc" / file.name).symlink_to("../../blobs/0123")
    return folder


def test_in_the_cache_of_the_hub(file, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = repository(file, tmp_path / "hub")
    expected = load_model(file).state_dict()
    for place in (folder, folder / "snapshots" / "abc", folder / "snapshots" / "abc" / file.name):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(place).state_dict().items())
    snapshot = str(folder / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: snapshot)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, name: f"{snapshot}/{name}")
    for name in ("owner/name", f"owner/name/{file.name}"):
        source = ModelSource(name)
        assert skeleton(source).config.model_type == "llama" and source.fingerprint == f"hub:{name}"
        assert len(load_tokenizer(source)) == 64
    (folder / "snapshots" / "abc" / "other.gguf").symlink_to("../../blobs/0123")
    with pytest.raises(
        ValueError, match=r"owner/name holds several models as GGUF \(model-Q8_0.gguf, other.gguf\); nam"
    ):
        load_model("owner/name")
