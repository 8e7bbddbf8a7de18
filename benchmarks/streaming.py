"""Time and memory of compressing a checkpoint that is larger than the memory it may use.

    python benchmarks/make_checkpoint.py --out /big/llama2-7b-random
    python benchmarks/streaming.py --model /big/llama2-7b-random --work /big/work

First the files are copied plainly (read, write, fsync), then compressed, each in a process of its own and with none of
the source in the page cache. Memory is RssAnon of /proc, sampled every 10 ms: the pages of mapped files are not ours.
One row per measurement is appended to benchmarks/results/streaming.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "streaming.jsonl"
METHODS = {
    "mixt": {"name": "mixt", "num_branches": 4},
    "mean_output": {"name": "mean_output"},
    "svd_llm": {"name": "svd_llm", "keep": 0.0625},
}


class PeakMemory(threading.Thread):
    """The largest RssAnon that is seen, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._done = 0, threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, rss_anon())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self.peak, rss_anon())


def rss_anon() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget(folder: Path) -> None:
    """Put the files of a folder out of the page cache."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(model: Path, work: Path, asked: argparse.Namespace) -> dict[str, Any]:
    for file in model.iterdir():
        shutil.copyfile(file, work / file.name)
        with (work / file.name).open("rb") as handle:
            os.fsync(handle.fileno())
    return {}


def compress(model: Path, work: Path, asked: argparse.Namespace) -> dict[str, Any]:
    import torch

    from tensormix.compression.checkpoint import compress_checkpoint
    from tensormix.plan import Plan

    torch.set_num_threads(asked.threads)
    batches = None
    if asked.method != "mixt":
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randint(3, 32000, (1, asked.window), generator=generator) for _ in range(asked.windows)]
    plan = Plan.model_validate([{"blocks": f"last {asked.depth}", "method": METHODS[asked.method]}])
    rows = compress_checkpoint(model, work / "out", plan, batches, workers=asked.workers, spill=asked.spill)
    parameters = sum(row["dense_parameters"] - row["parameters"] for row in rows)
    return {"sites": len(rows), "parameters_saved": parameters}


def measure(what: str, asked: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: the work, its wall time and its peak memory."""
    work = asked.work / what
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    forget(asked.model)
    words = [sys.executable, __file__, *sys.argv[1:], "--only", what]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    shutil.rmtree(work)
    return json.loads(done.stdout.splitlines()[-1])


def work_alone(what: str, asked: argparse.Namespace) -> dict[str, Any]:
    memory = PeakMemory()
    memory.start()
    began = time.perf_counter()
    facts = {"copy": copy, "compress": compress}[what](asked.model, asked.work / what, asked)
    os.sync()
    return {**facts, "seconds": round(time.perf_counter() - began, 2), "peak_rss_anon_bytes": memory.stop()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder on the same disk")
    parser.add_argument("--method", choices=METHODS, default="mixt")
    parser.add_argument("--depth", type=int, default=17, help="how many blocks from the end")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--windows", type=int, default=8, help="of calibration")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--spill", action="store_true", help="activations on the disk")
    parser.add_argument("--only", choices=("copy", "compress"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(work_alone(asked.only, asked)))
        return
    from tensormix.storage.files import environment, now

    copied, compressed = measure("copy", asked), measure("compress", asked)
    row = {
        "benchmark": "streaming",
        "model": asked.model.name,
        "model_bytes": sum(file.stat().st_size for file in asked.model.glob("*.safetensors")),
        **{key: getattr(asked, key) for key in ("method", "depth", "workers", "threads", "windows", "window", "spill")},
        **compressed,
        "copy_seconds": copied["seconds"],
        "times_a_copy": round(compressed["seconds"] / copied["seconds"], 3),
        "measured": now(),
        "environment": environment(),
    }
    with RESULTS.open("a") as handle:
        handle.write(json.dumps(row) + "\n")
    print(json.dumps({key: value for key, value in row.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
