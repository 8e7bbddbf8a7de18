"""On a real GGUF file: it is the model that its folder of floats is, and compressed it answers. `make real` runs it."""

import os
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.models import ModelSource, load_model, load_tokenizer
from tensormix.plan import Plan
from tensormix.recipe import Recipe
from tensormix.run.check import check

FILE, FLOATS = os.environ.get("TENSORMIX_REAL_GGUF"), os.environ.get("TENSORMIX_REAL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        FILE is None or FLOATS is None, reason="TENSORMIX_REAL_GGUF names no SmolLM2 as GGUF (make real)"
    ),
]
PLAN = Plan.model_validate([{"blocks": "last 4", "method": {"name": "rtn", "bits": 8}}])


def test_the_file_is_counted_without_its_weights():
    began = time.process_time()
    found = check(Recipe.model_validate({"model": FILE, "plan": PLAN.model_dump()}))
    assert time.process_time() - began < 3 and found["dense"]["parameters"] == 134_515_008
    bits = ModelSource(FILE).stored_bits
    assert bits is not None and 66_355_200 < bits / 8 < Path(str(FILE)).stat().st_size


def test_from_file_to_folder_as_in_memory_and_as_from_its_floats(tmp_path):
    compress_checkpoint(str(FILE), tmp_path / "out", PLAN)
    compress_checkpoint(str(FLOATS), tmp_path / "expected", PLAN)
    files = sorted(file.name for file in (tmp_path / "expected").glob("*.safetensors"))
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes() for name in files)
    model = load_model(str(FILE))
    compress(model, PLAN)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tensors = streamed.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = tokenizer.decode(streamed.generate(ids, max_new_tokens=24, do_sample=False)[0][ids.shape[1] :])
    assert "Paris" in answer


def test_its_tokenizer_is_that_of_its_folder():
    text = "It was 12345 (in \u4e2d\u6587), <|im_start|>user said; caf\u00e9."
    assert load_tokenizer(str(FILE))(text)["input_ids"] == load_tokenizer(str(FLOATS))(text)["input_ids"]
