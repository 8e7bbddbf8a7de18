"""How much memory a streamed walk may take: bounds from the sizes in the config, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

import tensormix
from tensormix.models import skeleton


def config(width: int, inner: int, blocks: int, dtype: str = "bfloat16") -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )


WIDE = config(512, 1408, 18)  # much larger than what it may take
NARROW = config(128, 128, 2, "float32")  # small beside its activations
EXPERTS = Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=512,
    moe_intermediate_size=512,
    num_experts=64,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    dtype="bfloat16",
    architectures=["Qwen3MoeForCausalLM"],
)
MODELS: dict[str, PreTrainedConfig] = {"wide": WIDE, "narrow": NARROW, "experts": EXPERTS}
SLACK = 24_000_000  # bytes: what the allocator keeps, thread stacks, one chunk of a file

# Each case is a line on stdin and is measured in a fork, so that libraries are imported once and no case sees what
# another one left in the allocator.
CODE = """
import json, os, re, sys, threading
from pathlib import Path
from typing import Literal
import torch
from tensormix.methods import LinearMethod, MeanOutput, Mixt
from tensormix.operators import LowRank
from tensormix.plan import Plan, Rule
from tensormix.statistics import Gram
from tensormix.compression.checkpoint import compress_checkpoint
import transformers.models.llama.modeling_llama, transformers.models.qwen3_moe.modeling_qwen3_moe, tensormix.hf

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

METHODS = {"mixt": Mixt(num_branches=2), "small": Mixt(num_branches=3), "cheap": Cheap(), "mean_output": MeanOutput()}

def anon():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def measured(folder, out, method, windows, window, spill):
    batches = [torch.full((1, window), 5) for _ in range(windows)]
    plan = Plan((Rule(method=METHODS[method]),))
    done, before = threading.Event(), anon()
    peak = before
    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anon())
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        compress_checkpoint(folder, Path(out), plan, batches, spill=spill)
    finally:
        done.set()
        watcher.join()
    return peak - before

torch.set_num_threads(1)
torch.randn(256, 256).bfloat16() @ torch.randn(256, 256).bfloat16()  # the libraries have their buffers now
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        print(json.dumps(measured(**json.loads(line))), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("null", flush=True)
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")
pytestmark = needs_proc
Peak = Callable[..., int]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    generator = torch.Generator().manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    for name, shape in MODELS.items():
        shape.save_pretrained(root / name)
        weights: dict[str, Tensor] = {}
        for tensor, like in skeleton(root / name).state_dict().items():
            weights |= as_stored(tensor, torch.rand(like.shape, generator=generator).sub_(0.5).mul_(0.1).to(like.dtype))
        save_file(weights, root / name / "model.safetensors", {"format": "pt"})
    return {name: root / name for name in MODELS}


def as_stored(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A stack of experts is in the file expert by expert."""
    path, _, stack = name.rpartition(".")
    if not path.endswith("experts"):
        return {name: tensor}
    parts = ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",)
    return {
        f"{path}.{expert}.{part}.weight": weight.clone()
        for expert, weights in enumerate(tensor)
        for part, weight in zip(parts, weights.chunk(len(parts)), strict=True)
    }


@pytest.fixture(scope="module")
def peak(folders, tmp_path_factory) -> Peak:
    """Anonymous memory of one compression beyond what the process had before, in bytes."""
    source = str(Path(tensormix.__file__).parents[1])  # the package that is tested, not the one that is installed
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CODE],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONPATH": source},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def ask(model: str, method: str, windows: int = 0, window: int = 256, spill: bool = False) -> int:
        out = tmp_path_factory.mktemp("out") / "small"
        asked = {"folder": str(folders[model]), "out": str(out), "method": method}
        process.stdin.write(json.dumps({**asked, "windows": windows, "window": window, "spill": spill}) + "\n")
        process.stdin.flush()
        found = json.loads(process.stdout.readline())
        assert found is not None, "the measured process failed; its traceback is on stderr"
        return found

    yield ask
    process.stdin.close()
    process.stdout.close()
    assert process.wait(60) == 0


def size(of: LlamaConfig) -> int:
    return 2 if "bfloat16" in str(of.dtype) else 4


def block_bytes(of: LlamaConfig) -> int:
    D, F = of.hidden_size, of.intermediate_size
    return size(of) * (4 * D * D + 3 * D * F + 2 * D)


def inside_bytes(of: LlamaConfig, window: int) -> int:
    """One window in one block, and as fp64 for a statistic."""
    D, F = of.hidden_size, of.intermediate_size
    return 2 * size(of) * window * (8 * D + 4 * F) + 8 * window * max(D, F)


def list_bytes(of: LlamaConfig, windows: int, window: int) -> int:
    """What enters a block, or leaves it, for all windows."""
    return size(of) * windows * window * of.hidden_size


def test_weights_only(peak):
    """At most two dense blocks, though the model is nine times as large."""
    bound = 2 * block_bytes(WIDE) + SLACK
    assert bound < WIDE.num_hidden_layers * block_bytes(WIDE) / 3
    assert peak("wide", "mixt") < bound


def test_calibrated(peak):
    """Two dense blocks, the statistics of one block, and the activations."""
    D, F, windows, window = WIDE.hidden_size, WIDE.intermediate_size, 4, 256
    statistics = 8 * (6 * D * D + F * F)
    activations = list_bytes(WIDE, windows, window) + inside_bytes(WIDE, window)
    bound = 2 * block_bytes(WIDE) + statistics + activations + SLACK
    assert bound < WIDE.num_hidden_layers * block_bytes(WIDE)
    assert peak("wide", "cheap", windows, window) < bound


def test_activations_are_there_once_or_not_at_all(peak):
    """What leaves a block takes the place of what entered it, window by window; in files it is not in memory.

    Without the activations the bound is smaller than a single list of them.
    """
    windows, window = 208, 512
    one_list = list_bytes(NARROW, windows, window)
    rest = 2 * block_bytes(NARROW) + inside_bytes(NARROW, window) + SLACK
    assert one_list > 1.5 * rest
    assert one_list < peak("narrow", "mean_output", windows, window) < one_list + rest
    assert peak("narrow", "mean_output", windows, window, spill=True) < rest


def test_experts_are_never_there_twice(peak):
    """The files hold them one by one, the model has stacks: one of each, what it becomes, and less than another."""
    stacks = 2 * EXPERTS.num_experts * 3 * EXPERTS.hidden_size * EXPERTS.moe_intermediate_size
    becomes = stacks * 3 / 16
    assert 3 * SLACK < stacks
    assert peak("experts", "small") < stacks + becomes + SLACK
