"""Ctrl-C in a real process, amid its work: what is finished stays, and the same call ends with the same bits."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from tensormix.recipe import Recipe
from tensormix.run import run_recipe, stage_rows


def written(tiny: Path, folder: Path) -> Path:
    """A recipe whose blocks take long enough to be stopped between, and that measures nothing."""
    method = {"name": "monarch", "keep": 0.5, "blocks": 4, "steps": 200}
    data = {
        "model": str(tiny),
        "plan": [{"sites": r".*mlp\..*", "method": method}],
        "calibration": {"text": {"facts": True}, "num_windows": 4, "window": 32},
        "diagnose": None,
        "profile": None,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def untimed(folder: Path) -> list[dict]:
    return [{**row, "seconds": None} for row in stage_rows(folder, "compress")]


def test_ctrl_c_loses_nothing_and_changes_nothing(tiny, tmp_path):
    file, out = written(tiny, tmp_path), tmp_path / "stopped"
    journal = out / "compressed.journal.jsonl"
    command = [sys.executable, "-m", "tensormix.cli", "run", str(file), "--out", str(out)]
    command += ["--threads", str(torch.get_num_threads())]  # sums depend on it
    # A test run that was itself started in the background inherits a Ctrl-C that is ignored, and passes it on.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **heard)
    while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 1):
        time.sleep(0.002)  # until the first block is finished
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and "Traceback" not in said
    assert "Stopped. Finished stages are kept; the same command goes on from there." in " ".join(said.split())
    first = {path.name: path.stat().st_mtime_ns for path in (out / ".compressed.part").glob("*.safetensors")}
    finished = {name for name in first if f'"{name}"' in journal.read_text()}
    assert 1 <= len(finished) < 5 and not (out / "compress.json").exists()  # 4 blocks, and what is in none

    recipe = Recipe.load(file)
    run_recipe(recipe, out)
    after = {path.name: path.stat().st_mtime_ns for path in (out / "compressed").glob("*.safetensors")}
    assert all(after[name] == first[name] for name in finished)  # not written again
    run_recipe(recipe, tmp_path / "whole", reference=out / "dense")
    assert contents(out / "compressed") == contents(tmp_path / "whole" / "compressed")
    assert untimed(out) == untimed(tmp_path / "whole")
