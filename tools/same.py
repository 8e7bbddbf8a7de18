"""Two commits compared by what they make: the checkpoints to the bit, and the rows of every stage.

    python tools/same.py BASE [OTHER]     OTHER: the working tree, if nothing is said
    python tools/same.py BASE --quick     some of the cases, in less than a minute
    python tools/same.py BASE --only 'recover/*'

Both sides run the same cases, those of this folder, through the doors that stay: the command line and the names that
`tensormix` offers. Each difference is one line; the exit code is 1 if there is any. What a commit makes is kept in
build/same/COMMIT.json, so a base is made once.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from same_cases import CASES, QUICK
from same_memory import SAYINGS

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "same"
SHOWN = 8  # differences of one case
NAMES = ["models/all", *CASES, *SAYINGS]
ALONE = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1",
    "TENSORMIX_TRACEBACK": "1", "TRITON_INTERPRET": "1", "COLUMNS": "160",
}  # fmt: skip


def main() -> int:
    asked = arguments()
    names = [name for name in NAMES if not asked.quick or name in QUICK or name == NAMES[0]]
    names = [name for name in names if not asked.only or asked.only in name or fnmatch(name, asked.only)]
    if not names:
        print(f"no case is called {asked.only!r}; they are: {', '.join(NAMES)}")
        return 1
    base, other = side(asked.base, names), side(asked.other, names)
    missing = [name for name in names if "error" in base[name]]
    found = {name: list(differences(base[name], other[name])) for name in names if name not in missing}
    for name in missing:
        print(f"left out: {name} ends at the base with {base[name]['error']}")
    for name, lines in found.items():
        shown = lines if asked.all else lines[:SHOWN]
        more = [f"... and {len(lines) - len(shown)} more, shown by --all"] if len(lines) > len(shown) else []
        for line in [*shown, *more]:
            print(f"{name}: {line}")
    total, touched = sum(map(len, found.values())), sum(map(bool, found.values()))
    if total or not found:
        print(f"{total} differences in {touched} of {len(found)} cases")
        return 1
    files = sum(len(base[name].get("files", ())) for name in found)
    values = sum(leaves(base[name]) for name in found) - files
    print(f"same: {len(found)} cases, {files} files and {values} values; {len(missing)} cases left out")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="a commit")
    parser.add_argument("other", nargs="?", help="another one; without it the working tree")
    parser.add_argument("--quick", action="store_true", help="some of the cases")
    parser.add_argument("--only", metavar="PATTERN", help="the cases whose names contain or match it")
    parser.add_argument("--all", action="store_true", help=f"all differences, not {SHOWN} of each case")
    return parser.parse_args()


def side(commit: str | None, names: list[str]) -> dict[str, Record]:
    """The records of a commit, or of the working tree: those that are kept, and the others made now."""
    is_clean = commit is None and not git("status", "--porcelain", "--", "src", "pyproject.toml")
    known = git("rev-parse", f"{commit or 'HEAD'}^{{commit}}").decode().strip() if commit or is_clean else None
    file = KEPT / f"{known or 'tree'}.json"
    records = kept(file) if known else {}
    wanted = [name for name in names if name not in records]
    began = time.perf_counter()
    if wanted:
        with tempfile.TemporaryDirectory() as folder:
            tree = ROOT if commit is None else unpacked(commit, Path(folder) / "tree")
            records |= made(tree, Path(folder), wanted)
        KEPT.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"stamp": stamp(), "cases": records}))
        part.replace(file)
    seconds = time.perf_counter() - began
    print(f"{commit or 'working tree'}: {len(wanted)} of {len(names)} cases made in {seconds:.0f} s", file=sys.stderr)
    return records


def git(*words: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, stdout=subprocess.PIPE).stdout


def unpacked(commit: str, folder: Path) -> Path:
    """The package at a commit, in a folder that git need not know."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit, "src", "pyproject.toml"))) as archive:
        archive.extractall(folder, filter="data")
    return folder


def stamp() -> str:
    """Changes with the cases and with the packages they stand on: what was kept then counts no more."""
    digest = hashlib.sha256(sys.version.encode())
    for package in ("torch", "transformers", "tokenizers", "safetensors", "numpy"):
        digest.update(f"{package} {metadata.version(package)} ".encode())
    for file in sorted(Path(__file__).parent.glob("same_*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def kept(file: Path) -> dict[str, Record]:
    data = json.loads(file.read_text()) if file.exists() else {}
    return data["cases"] if data.get("stamp") == stamp() else {}


def made(tree: Path, folder: Path, names: list[str]) -> dict[str, Record]:
    """The records of cases, by a process of its own that sees no other package than the tree's.

    Raises:
        RuntimeError: the process ended before its last case.
    """
    out = folder / "records.jsonl"
    script = Path(__file__).with_name("same_record.py")
    environment = {**os.environ, **ALONE, "PYTHONPATH": str(tree / "src")}
    line = [sys.executable, "-W", "ignore", str(script), str(tree), str(out), *names]
    done = subprocess.run(line, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    lines = out.read_text().splitlines() if out.exists() else []
    records = {record.pop("case"): record for record in map(json.loads, lines)}
    if len(records) < len(names):
        last = names[len(records)]
        raise RuntimeError(f"{tree}: ended at {last}: {done.stderr.decode(errors='replace')[-2000:]}")
    return records


def differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """One line for each value that is not the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if key == "seconds" and not place:
                continue
            where = f"{place} {key}".strip()
            if key in old and key in new:
                yield from differences(old[key], new[key], where)
            else:
                yield f"{where}: {short(old.get(key, 'nothing'))} -> {short(new.get(key, 'nothing'))}"
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{place}: {len(old)} items -> {len(new)} items"
        for index, (one, two) in enumerate(zip(old, new, strict=False)):
            yield from differences(one, two, f"{place}[{index}{title(one)}]")
    elif old != new or type(old) is not type(new):
        yield f"{place}: {short(old)} -> {short(new)}"


def title(row: Any) -> str:
    """What tells a row from others."""
    named = [str(row[key]) for key in ("kind", "site", "cell") if row.get(key)] if isinstance(row, dict) else []
    return f" {' '.join(named)}" if named else ""


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def leaves(data: Any) -> int:
    if isinstance(data, dict | list):
        return sum(map(leaves, data.values() if isinstance(data, dict) else data))
    return 1


if __name__ == "__main__":
    sys.exit(main())
