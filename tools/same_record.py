"""One side of tools/same.py: runs cases on the package that PYTHONPATH names, and writes down what came out.

    python tools/same_record.py TREE OUT CASE...

OUT gets one line of JSON for each case: hashes of the files of checkpoints, and what stands in all other files of
JSON, less what may differ from run to run.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import shutil
import sys
import time
import tomllib
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import torch
from same_cases import CASES, Case
from same_memory import SAYINGS
from same_models import save_all

Record = dict[str, Any]
# What differs from run to run: times, machines, hashes of requests. Summaries are texts for people.
VARYING = {
    "seconds", "finished", "environment", "key", "median_ms", "low_ms", "high_ms", "speedup", "peak_memory_bytes",
    "separate_ms", "together_ms", "summary",
}  # fmt: skip
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


def main() -> None:
    tree, out = Path(sys.argv[1]), Path(sys.argv[2])
    package = Path(str(importlib.import_module("tensormix").__file__)).parent
    if package.parents[1] != tree:
        raise RuntimeError(f"the package is that of {package}, not that of {tree}")
    importlib.import_module("tensormix.hf")
    models = out.parent / "models"
    save_all(models)
    shutil.copytree(next(package.rglob("tokenizer.json")).parent, models / "embedded")
    os.chdir(models)
    with out.open("w") as lines:
        for name in sys.argv[3:]:
            began = time.perf_counter()
            work = out.parent / "work" / name
            record = recorded(name, work)
            shutil.rmtree(work, ignore_errors=True)
            record["seconds"] = round(time.perf_counter() - began, 1)
            lines.write(json.dumps({"case": name, **record}) + "\n")
            lines.flush()


def recorded(name: str, work: Path) -> Record:
    """What a case left in its folder and said, or the error that ended it."""
    torch.manual_seed(0)
    work.mkdir(parents=True)
    printed, noise = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(noise):
            said = outcome(name, work, printed)
        return {"said": plain(said, work), **contents(work)}
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return {"error": f"{text.replace(str(work), 'WORK')} ({Path(last.filename).name}:{last.lineno})"}


def outcome(name: str, work: Path, printed: io.StringIO) -> Any:
    if name == "models/all":
        return {str(file): sha(file) for file in sorted(Path().rglob("*")) if file.suffix not in ("", ".yaml")}
    if name not in CASES:
        return SAYINGS[name](work)
    case = CASES[name]
    line = words(case, work)
    if case.refused:
        return sentence(line)
    ask(line)
    if case.verb in ("sweep", "compare") or name == "measured/all":
        leveled(work / "out")
        ask(["report", str(work / "out")])
    if name == "measured/all":
        ask(["report", str(work / "out"), str(work / "out" / "dense"), "--out", str(work / "both.html")])
    if case.verb in ("run", "sweep", "compare"):
        return None
    return json.loads(printed.getvalue()) if "--json" in case.options else printed.getvalue().splitlines()


def sentence(line: list[str]) -> str:
    """What the command line says against a request.

    Raises:
        RuntimeError: it says nothing.
    """
    try:
        ask(line)
    except ValueError as error:
        return str(error)
    raise RuntimeError("it was not refused")


def words(case: Case, work: Path) -> list[str]:
    """The command line of a case. JSON is YAML, so its settings lie as JSON beside the models."""
    if case.verb == "list":
        return ["list", *case.options]
    file = Path(f"{case.verb}.yaml")  # paths in it are taken from here
    file.write_text(json.dumps(case.settings))
    out = [] if case.verb in ("check", "predict") else ["--out", str(work / "out")]
    page = ["--no-page"] if case.verb in ("sweep", "compare") else []
    return [case.verb, str(file), *out, *page, *case.options]


def ask(line: list[str]) -> None:
    """Run one command line in this process."""
    sys.argv = ["tensormix", *line]
    try:
        entry()()
    except SystemExit as end:
        if end.code:
            raise


@cache
def entry() -> Callable[[], Any]:
    """The function behind the command, wherever the tree keeps it."""
    import tensormix

    tree = Path(str(tensormix.__file__)).parents[2]
    command = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]["tensormix"]
    module, _, name = command.partition(":")
    return getattr(importlib.import_module(module), name)


def leveled(folder: Path) -> None:
    """Make all that varies in a run folder the same, so that the report can be compared."""
    for file in folder.rglob("*.json"):
        if file.name not in MODEL_FILES and "tokenizer" not in file.name:
            file.write_text(json.dumps(level(json.loads(file.read_text()))))


def level(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: constant(key, value) if varies(key) else level(value) for key, value in data.items()}
    return [level(item) for item in data] if isinstance(data, list) else data


def constant(key: str, value: Any) -> Any:
    """What stands for a value that varies, of the same kind."""
    if isinstance(value, dict):
        return {name: constant(name, item) for name, item in value.items()}
    if isinstance(value, str) or key == "commit":  # a tree outside git knows no commit
        return "2000-01-01T00:00:00+00:00" if key == "finished" else "same"
    return 1 if isinstance(value, int | float) else value


def varies(key: str) -> bool:
    return key in VARYING or key.startswith("speed at")


def contents(work: Path) -> Record:
    """Hashes of the files of checkpoints and reports, and what the other files of JSON say."""
    files, rows = {}, {}
    for file in sorted(work.rglob("*")):
        name = str(file.relative_to(work))
        if (file.parent / "config.json").exists() or file.suffix in (".safetensors", ".html"):
            files[name] = sha(file, work)
        elif file.suffix == ".json":
            rows[name] = plain(json.loads(file.read_text()), work)
    return {"files": files, "rows": rows}


def sha(file: Path, work: Path | None = None) -> str:
    data = file.read_bytes()
    if work is not None and file.suffix in (".html", ".json"):
        data = data.replace(str(work).encode(), b"WORK").replace(str(Path.cwd()).encode(), b"MODELS")
    return hashlib.sha256(data).hexdigest()


def plain(data: Any, work: Path) -> Any:
    """The same data without what varies, and with folders by name."""
    if isinstance(data, dict):
        return {str(key): plain(value, work) for key, value in data.items() if not varies(str(key))}
    if isinstance(data, list | tuple):
        return [plain(item, work) for item in data]
    if isinstance(data, str):
        return data.replace(str(work), "WORK").replace(str(Path.cwd()), "MODELS")
    return data


if __name__ == "__main__":
    main()
