"""Compress the last four blocks of a model, save it, load it again: the logits are equal to the bit."""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensormix
import tensormix.hf
from tensormix.demo import model_folder

model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(model_folder())
plan = tensormix.Plan.model_validate([{"blocks": "last 4", "method": {"name": "mixt", "num_branches": 4}}])
rows = tensormix.compress(model, plan)
print(f"{len(rows)} layers: {sum(r['dense_parameters'] for r in rows):,} -> {sum(r['parameters'] for r in rows):,}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer("What is 7 + 5?", return_tensors="pt").input_ids
with torch.no_grad():
    print("logits equal to the bit:", torch.equal(model(ids).logits, again(ids).logits))
