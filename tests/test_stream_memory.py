"""How much memory a streamed walk may take: a bound from the sizes in the config, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from tensormix.models import skeleton

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=10,
    num_attention_heads=8,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)
WINDOWS, WINDOW = 4, 256
SLACK = 24_000_000  # bytes: what the allocator keeps, thread stacks, one chunk of a file

CODE = """
import json, re, sys, threading
from pathlib import Path
from typing import Literal
import torch
from tensormix.methods import LinearMethod, MeanOutput, Mixt
from tensormix.operators import LowRank
from tensormix.plan import Plan, Rule
from tensormix.statistics import Gram
from tensormix.stream import compress_checkpoint
import transformers.models.llama.modeling_llama, tensormix.hf

class Cheap(LinearMethod):
    "Needs the largest statistic and little else."
    name: Literal["cheap"] = "cheap"
    needs = (Gram,)
    def empty(self, in_features, out_features):
        return LowRank(in_features, out_features, rank=1)
    def fit(self, weight, stats):
        op = LowRank(weight.shape[1], weight.shape[0], rank=1).to(weight)
        for parameter in op.parameters():
            torch.nn.init.ones_(parameter)
        return op

def anon():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anon())

folder, out, method, spill, windows, window = sys.argv[1:]
torch.set_num_threads(1)
torch.randn(256, 256).bfloat16() @ torch.randn(256, 256).bfloat16()  # the libraries have their buffers now
batches = [torch.full((1, int(window)), 5) for _ in range(int(windows))]
methods = {"mixt": Mixt(num_branches=2), "cheap": Cheap(), "mean_output": MeanOutput()}
plan = Plan((Rule(method=methods[method], blocks="first 2" if method == "mean_output" else "all"),))
done, before = threading.Event(), anon()
peak = before
watcher = threading.Thread(target=watch)
watcher.start()
compress_checkpoint(folder, Path(out), plan, batches, spill=spill == "spill")
done.set()
watcher.join()
print(json.dumps(peak - before))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "dense"
    folder.mkdir()
    CONFIG.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.rand(tensor.shape, generator=generator).sub_(0.5).mul_(0.1).bfloat16()
        for name, tensor in skeleton(folder).state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def peak(
    folder: Path, out: Path, method: str, spill: str = "keep", window: int = WINDOW, windows: int = WINDOWS
) -> int:
    """Anonymous memory beyond what the process had before, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), str(out), method, spill, str(windows), str(WINDOW)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def block_numbers() -> int:
    D, F = CONFIG.hidden_size, CONFIG.intermediate_size
    return 4 * D * D + 3 * D * F + 2 * D


def whole_model() -> int:
    return 2 * CONFIG.num_hidden_layers * block_numbers()


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")


@needs_proc
def test_weights_only(folder, tmp_path):
    """At most two dense blocks, though the model is five times as large."""
    bound = 2 * 2 * block_numbers() + SLACK
    assert bound < whole_model() / 3
    assert peak(folder, tmp_path / "out", "mixt") < bound


@needs_proc
def test_calibrated(folder, tmp_path):
    """Two dense blocks, the statistics of one block, and the activations."""
    D, F = CONFIG.hidden_size, CONFIG.intermediate_size
    statistics = 8 * (6 * D * D + F * F)
    activations = 3 * 2 * WINDOWS * WINDOW * D  # what enters, what leaves, one more
    inside = 4 * WINDOW * (8 * D + 4 * F) + 8 * WINDOW * F  # one batch in one block, and as fp64 for a statistic
    bound = 2 * 2 * block_numbers() + statistics + activations + inside + SLACK
    assert bound < whole_model()
    assert peak(folder, tmp_path / "out", "cheap") < bound


@needs_proc
def test_spilled_activations_are_not_in_memory(folder, tmp_path):
    """What enters a block and what leaves it are there at once: two lists, of which at least one is seen to be gone."""
    windows = 48
    one_list = 2 * windows * WINDOW * CONFIG.hidden_size
    kept = peak(folder, tmp_path / "kept", "mean_output", "keep", windows=windows)
    spilled = peak(folder, tmp_path / "spilled", "mean_output", "spill", windows=windows)
    assert kept - spilled > one_list
