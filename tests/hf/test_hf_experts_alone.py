"""What a loader without this package says of opened experts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tensormix.hf
from tensormix.sites.fused_experts import open_experts
from zoo import make


def experts_of(index):
    return f"model.layers.{index}.mlp.experts"


LOAD_TWICE = """
import sys
sys.path.insert(0, {source!r})
from transformers import AutoModelForCausalLM
for folder in {folders!r}:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print("refused:", "mismatch" in str(error).lower())
import tensormix.hf
for folder in {folders!r}:
    AutoModelForCausalLM.from_pretrained(folder)
    print("loaded")
"""


def test_loading_without_the_plugin_fails_loudly(tmp_path):
    """In a process of its own; also where nothing but experts was touched, and these only opened."""
    folders, families = [], ("qwen3_moe", "mixtral", "gpt_oss")
    for family in families:
        model = make(family)
        open_experts(model, experts_of(1))
        tensormix.hf.attach(model)
        model.save_pretrained(tmp_path / family)
        folders.append(str(tmp_path / family))
    code = LOAD_TWICE.format(source=str(Path(tensormix.__file__).parents[1]), folders=folders)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    wanted = ["refused: True"] * len(families) + ["loaded"] * len(families)
    assert done.stdout.splitlines() == wanted, done.stderr[-2000:]
