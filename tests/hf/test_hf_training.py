"""A compressed model is an ordinary one: it trains, changes its precision, and refuses what it cannot do."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import tensormix.hf
from tensormix.compression import compress
from tensormix.operators import LowRank
from tensormix.plan import Plan
from tensormix.sites import blocks
from zoo import ZOO, logits, make, token_ids

PLAN = Plan.model_validate(
    [
        {"blocks": "0", "method": {"name": "mixt", "num_branches": 3}},
        {"blocks": "2", "method": {"name": "drop_blocks"}},
        {"blocks": "3", "sites": ["o", "down"], "method": {"name": "svd", "keep": 0.5}},
    ]
)


def compressed(family):
    model = make(family)
    compress(model, PLAN)
    return model


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


class Tokens(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = token_ids(1, 8, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def train(model, folder, steps, resume=None):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=1, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Tokens()).train(resume_from_checkpoint=resume)


def test_the_trainer_accepts_it(tmp_path):
    model = load_after_saving(compressed("llama"), tmp_path / "start")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, tmp_path / "run", 2)
    assert any(name.endswith("core_0") and not torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval()
    assert torch.equal(logits(load(tmp_path / "run" / "checkpoint-2")), logits(model))

    resumed = load_after_saving(compressed("llama"), tmp_path / "start again")
    train(resumed, tmp_path / "run", 2, resume=str(tmp_path / "run" / "checkpoint-1"))
    resumed.eval()
    assert torch.equal(logits(resumed), logits(model))


def load_after_saving(model, folder):
    model.save_pretrained(folder)
    return load(folder)


def test_precision_may_be_changed_after_loading(tmp_path):
    model = load_after_saving(compressed("llama"), tmp_path)
    assert {p.dtype for p in model.bfloat16().parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"operator": {}}, r"unknown key 'operator'. Known: quant_method, format_version, operators"),
        ({"format_version": 2}, r"has format_version 2, this tensormix reads 1; install the version .* that wrote it"),
        ({"quant_method": "gptq"}, r"quant_method must be 'tensormix', got 'gptq'"),
    ],
)
def test_a_config_that_is_not_ours(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        tensormix.hf.StructuredConfig.from_dict({"operators": {}, **changes})


def test_an_operator_for_a_module_that_is_not_there(tmp_path):
    compressed("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    operators = config["quantization_config"]["operators"]
    operators["model.layers.9.mlp.up_proj"] = operators.pop("model.layers.0.mlp.up_proj")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names 'model.layers.9.mlp.up_proj', which a LlamaForCausalLM does not have"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tensor_parallelism_is_refused():
    model = make("llama")
    model.config.distributed_config = SimpleNamespace(tp_plan="auto")
    quantizer = tensormix.hf.StructuredQuantizer(tensormix.hf.StructuredConfig())
    with pytest.raises(ValueError, match=r"tp_plan: structured operators cannot be split .* load without tp_plan"):
        quantizer.preprocess_model(model)


def test_a_model_quantized_by_something_else_is_refused():
    model = make("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="the model is quantized by 'gptq' already"):
        tensormix.hf.attach(model)


def test_a_dense_model_stays_an_ordinary_one(tmp_path):
    model = make("llama")
    tensormix.hf.attach(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_compressing_while_loading_is_refused(tmp_path):
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=tensormix.hf.StructuredConfig())


def test_an_empty_skeleton_needs_no_weights():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ZOO["llama"])
    tensormix.hf.install_empty(model, compressed("llama").config.quantization_config.operators)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert isinstance(blocks(model)[3].mlp.down_proj, LowRank)
