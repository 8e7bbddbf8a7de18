"""Loading, and what is said when there is nothing to load."""

from __future__ import annotations

import json
import logging
import shutil
import warnings

import huggingface_hub.constants
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from tensormix.compression import compress
from tensormix.models import fingerprint, load_model, load_tokenizer, skeleton
from tensormix.plan import Plan
from zoo import make, token_ids

PLAN = Plan.model_validate(
    [
        {"blocks": "0", "method": {"name": "mixt", "num_branches": 2}},
        {"blocks": "1", "method": {"name": "drop_blocks"}},
    ]
)


@pytest.fixture
def dense(tmp_path):
    make("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


@pytest.fixture
def small(tmp_path):
    model = make("llama")
    compress(model, PLAN)
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@torch.no_grad()
def test_a_dense_model(dense):
    model = load_model(dense)
    assert torch.equal(model(token_ids()).logits, make("llama")(token_ids()).logits)
    assert not model.training


@torch.no_grad()
def test_a_compressed_model(small):
    expected = make("llama")
    compress(expected, PLAN)
    assert torch.equal(load_model(str(small))(token_ids()).logits, expected(token_ids()).logits)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)],
)
def test_dtype(small, dtype, expected):
    assert {p.dtype for p in load_model(small, dtype=dtype).parameters()} == {expected}


def test_an_unknown_dtype(dense):
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16, float64, got 'fp16'"):
        load_model(dense, dtype="fp16")


def test_loading_is_quiet_and_leaves_the_settings_alone(dense, capfd):
    transformers_logging.set_verbosity(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            load_model(dense)
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
    assert caught == [] and "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("which", ["dense", "small"])
def test_a_skeleton_has_all_names_and_no_weights(which, request):
    folder = request.getfixturevalue(which)
    loaded, bones = load_model(folder), skeleton(folder)
    assert {n: p.shape for n, p in bones.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert {p.device.type for p in bones.parameters()} == {"meta"}


def test_a_skeleton_reads_no_weights(dense):
    for file in dense.glob("*.safetensors*"):
        file.unlink()
    assert skeleton(dense).config.num_hidden_layers == 4


def test_a_tokenizer(dense):
    from tokenizers import Tokenizer, models

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(
        dense
    )
    assert load_tokenizer(dense)("a")["input_ids"] == [0]


def test_no_tokenizer(dense):
    with pytest.raises(ValueError, match=r"model has no tokenizer \(no tokenizer.json\); copy the one of the original"):
        load_tokenizer(dense)


@pytest.mark.parametrize("read", [load_model, load_tokenizer, skeleton, fingerprint])
def test_a_folder_without_a_config(read, tmp_path):
    with pytest.raises(ValueError, match=r"is not a model folder: it has no config.json"):
        read(tmp_path)


def test_a_file(tmp_path):
    file = tmp_path / "model.txt"
    file.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"model\.txt is a file of no format .*; a model is a folder .* one such file .*, or a Hub id"
    ):
        load_model(file)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c", "not a model"])
def test_neither_a_folder_nor_a_hub_id(path):
    with pytest.raises(ValueError, match=r"is neither a folder or file that exists nor a Hub id such as 'owner/name'"):
        load_model(path)


def test_a_config_of_something_else(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json does not describe a transformers model: it has no model_type"):
        load_model(tmp_path)


def test_a_config_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        load_model(tmp_path)


def test_a_model_with_code_of_its_own(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"asks for code of its own \(model_type 'mine'\); tensormix never runs code"):
        skeleton(tmp_path)


def test_a_model_type_that_nobody_knows(dense):
    config = json.loads((dense / "config.json").read_text()) | {"model_type": "unheard_of"}
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model could not be loaded: .*unheard_of"):
        load_model(dense)


def test_no_weights(dense):
    for file in dense.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"model has a config.json but no weights \(\*.safetensors, \*.gguf\)"):
        load_model(dense)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_pickled_weights(dense, name):
    for file in dense.glob("*.safetensors*"):
        file.unlink()
    (dense / name).write_bytes(b"")
    with pytest.raises(
        ValueError, match=rf"has pickled weights \({name}\), .*save_pretrained\(new_folder\) writes safe"
    ):
        load_model(dense)


def test_a_truncated_file(dense):
    file = sorted(dense.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged or cut off \(.*\); fetch it again"):
        load_model(dense)


def test_a_missing_shard(dense):
    file = sorted(dense.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name} is missing, but model.safetensors.index.json names it"):
        load_model(dense)


def test_missing_tensors(dense, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(dense, tmp_path / "less", ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {key: value for file in dense.glob("*.safetensors") for key, value in load_file(file).items()}
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "less" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights lack model.layers.2.mlp.up_proj.weight, which LlamaForCausalLM"):
        load_model(tmp_path / "less")


def test_compressed_weights_that_do_not_fit_the_config(small):
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"]["operators"]["model.layers.0.mlp.up_proj"]["num_branches"] = 3
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"small(: the weights lack .*core_2| could not be loaded)"):
        load_model(small)


@pytest.mark.parametrize("read", [load_model, load_tokenizer, skeleton])
def test_a_hub_id_out_of_reach(read, offline):
    sentence = (
        r"'nobody/nothing' could not be loaded: there is no folder of that name here, and as a Hub id it was neither"
    )
    with pytest.raises(ValueError, match=sentence):
        read("nobody/nothing")


def test_a_fingerprint_follows_the_weights(dense, tmp_path):
    first = fingerprint(dense)
    shutil.copytree(dense, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == first
    file = sorted(dense.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(dense) != first
    assert fingerprint("owner/name") == "hub:owner/name"


def test_a_fingerprint_of_a_large_file_sees_both_ends(dense, monkeypatch):
    monkeypatch.setattr("tensormix.models.source._SAMPLE", 8)
    file = sorted(dense.glob("*.safetensors"))[0]
    seen = {fingerprint(dense)}
    original = file.read_bytes()
    for position in (0, -1):
        content = bytearray(original)
        content[position] ^= 1
        file.write_bytes(content)
        seen.add(fingerprint(dense))
    assert len(seen) == 3
