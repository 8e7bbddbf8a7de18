"""Fault injection: change one line of the source, and the tests that should notice must turn red.

    python tools/mutate.py            every fault
    python tools/mutate.py mixt       the faults in files whose path contains "mixt"
    python tools/mutate.py 40:60      those faults of the table, which lies in tools/faults

Works on a copy of the repository, so the working tree is never touched. Exit code 1 when a fault is missed, when its
line no longer exists, or when the tests are red before any fault.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import transformers  # noqa: F401
from faults import FAULTS
from faults.fault import Fault
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Trainer  # noqa: F401

sys.dont_write_bytecode = True  # two faults of one file may have the same size and second, and the stale one would run
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "runs")


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    first, colon, last = wanted.partition(":")
    if colon:
        faults = list(FAULTS[int(first or 0) : int(last or len(FAULTS))])
    else:
        faults = [fault for fault in FAULTS if wanted in fault.file]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        for tests in sorted({fault.tests for fault in faults}):
            if (found := first_failure(copy, tests)) is not None:
                print(f"red before any fault: {tests}: {found}")
                return 1
        missed = sum(not caught(copy, fault) for fault in faults)
    print(f"{len(faults) - missed} of {len(faults)} faults caught")
    return 1 if missed or not faults else 0


def caught(copy: Path, fault: Fault) -> bool:
    """Whether the named tests notice the fault; prints one line."""
    path = copy / "src/tensormix" / fault.file
    source = path.read_text()
    change = f"{fault.file}: {fault.old.strip()!r} -> {fault.new.strip()!r}"
    if source.count(fault.old) != 1:
        print(f"STALE   {change} (the line stands there {source.count(fault.old)} times)", flush=True)
        return False
    path.write_text(source.replace(fault.old, fault.new))
    try:
        found = first_failure(copy, fault.tests)
    finally:
        path.write_text(source)
    print(f"{'MISSED' if found is None else 'caught'}  {change} | {found}", flush=True)
    return found is not None


def first_failure(copy: Path, tests: str) -> str | None:
    """The first red line of these tests, or None when all are green.

    They run in a fork of this process, which has imported what takes long and nothing of the package.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = 1
            try:
                code = run_tests(copy, tests)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # whatever was raised: the copy is the parent's to remove
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log.seek(0)
        lines = log.read().splitlines()
    if code == 0:
        return None
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), (lines or [f"exit code {code}"])[-1])


def run_tests(copy: Path, tests: str) -> int:
    """In the child: the exit code of pytest on the copy's own package."""
    os.chdir(copy)
    sys.path[:] = [str(copy / "src"), *(path for path in sys.path if Path(path).resolve() != ROOT / "src")]
    ignored = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins are imported before pytest asks for them
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *ignored, *(f"tests/{name}" for name in tests.split())])
    package = sys.modules.get("tensormix")
    if package is not None and not str(package.__file__).startswith(str(copy)):
        print(f"ERROR the tests ran on {package.__file__}, not on the copy")
        code = 1
    sys.stdout.flush()
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
