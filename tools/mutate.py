"""Breaks what was changed, one thing at a time, and lists what no test notices.

    python tools/mutate.py                      what the working tree changed since the last commit
    python tools/mutate.py --base main          what it changed since a commit
    python tools/mutate.py --base "" src/a/b.py  every line of these files or folders

Only lines below src/ are broken. A file of src/PACKAGE/ROOM/ is judged by tests/ROOM/ and tests/test_ROOM*.py, and a
line in a function by those of these tests that call the function, the quickest first. The tests run on a copy of the
repository, so the working tree is never touched. Exit code 1 when something stays unnoticed, or when the tests are red
before anything is broken.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
from mutations import Mutation, mutations

sys.dont_write_bytecode = True  # two changes of one file may have the same size and second, and the stale one would run
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "runs")
HUNK = re.compile(r"^@@ -\S+ \+(\d+)(?:,(\d+))? @@")
COLLECTED_NOTHING = 5  # the exit code of pytest


class Tests(NamedTuple):
    """The tests of a room: the seconds of each, and which call the function that starts at a line of a file."""

    seconds: dict[str, float]
    calls: dict[str, list[str]]  # FILE:LINE -> tests

    def of(self, file: str, mutation: Mutation) -> list[str]:
        """Those that may notice it, quickest first. Lines outside functions run when the file is imported."""
        found = self.seconds if mutation.function is None else self.calls.get(f"{file}:{mutation.function}", [])
        return sorted(found, key=self.seconds.__getitem__)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=["src"], help="files or folders below src")
    parser.add_argument("--base", default="HEAD", help='the commit that is compared with; "" takes every line')
    parser.add_argument("--load", default="", help="modules with commas between, imported once for all tests")
    asked = parser.parse_args()
    for name in filter(None, asked.load.split(",")):
        importlib.import_module(name)
    root = Path(git("rev-parse", "--show-toplevel").strip())
    lines = changed_lines(root, asked.base, asked.paths)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / "copy"
        shutil.copytree(root, copy, ignore=LEFT_OUT)
        missed = []
        for room in sorted({room_of(file) for file in lines}):
            missed += unnoticed(copy, {f: found for f, found in lines.items() if room_of(f) == room}, room)
    print(f"\n{len(missed)} unnoticed" if lines else f"no line below src changed since {asked.base}")
    print("".join(f"{sentence}\n" for sentence in missed), end="")
    return 1 if missed else 0


def git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


def changed_lines(root: Path, base: str, paths: Sequence[str]) -> dict[str, list[int]]:
    """The changed lines of each Python file below src, from the repository's root; no lines stand for all."""
    os.chdir(root)
    new = git("ls-files", "--others", "--exclude-standard", "--", *paths).splitlines()
    found: dict[str, list[int]] = {}
    if not base:
        new += git("ls-files", "--", *paths).splitlines()
    else:
        file = ""
        for line in git("diff", "-U0", "--no-color", "--diff-filter=d", base, "--", *paths).splitlines():
            if line.startswith("+++ "):
                file = line.removeprefix("+++ b/")
            elif (hunk := HUNK.match(line)) and (count := int(hunk[2] or 1)):
                found.setdefault(file, []).extend(range(int(hunk[1]), int(hunk[1]) + count))
    found |= {name: [] for name in new}
    return {name: lines for name, lines in found.items() if name.startswith("src/") and name.endswith(".py")}


def room_of(file: str) -> str:
    return Path(file).parts[2].removesuffix(".py")


def unnoticed(copy: Path, lines: dict[str, list[int]], room: str) -> Iterator[str]:
    """A sentence for each break in these files of one room that its tests do not see."""
    mirrors = [copy / "tests" / room, *(copy / "tests").glob(f"test_{room}*.py")]
    places = [str(path.relative_to(copy)) for path in mirrors if path.exists()]
    if not places:
        yield from (f"{file}: neither tests/{room}/ nor tests/test_{room}*.py is there" for file in lines)
        return
    tests = observed(copy, places, [str(copy / file) for file in lines])
    for file in lines:
        path = copy / file
        source = path.read_text(encoding="utf-8")
        for mutation in mutations(source, lines[file]):
            change = f"{file}:{mutation.line}: {mutation.old!r} -> {mutation.new!r}"
            judges = tests.of(file, mutation)
            path.write_text(mutation.source, encoding="utf-8")
            # A break may make a loop endless: what takes far longer than before is noticed too.
            limit = 30 + 5 * round(sum(tests.seconds[name] for name in judges))
            found = first_failure(copy, judges, limit) if judges else None
            path.write_text(source, encoding="utf-8")
            print(f"{'unseen' if found is None else 'seen  '}  {change} | {found}", flush=True)
            if found is None:
                yield change + ("" if judges else f" (no test in {' '.join(places)} calls it)")


def observed(copy: Path, places: list[str], files: list[str]) -> Tests:
    """The tests on the unbroken code. They must be green."""
    notes = copy.parent / "notes.json"
    if (found := first_failure(copy, places, 0, Observer(notes, files, copy))) is not None:
        raise SystemExit(f"red before anything is broken: {found}")
    return Tests(**json.loads(notes.read_text()))


class Observer:
    """A plugin of pytest that writes down which test takes how long and calls which function of the files."""

    def __init__(self, notes: Path, files: list[str], copy: Path) -> None:
        self.notes, self.files, self.copy = notes, set(files), copy
        self.found = Tests({}, {})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        called: set[str] = set()

        def note(frame: FrameType, event: str, argument: object) -> None:
            if (name := frame.f_code.co_filename) in self.files:
                called.add(f"{Path(name).relative_to(self.copy)}:{frame.f_code.co_firstlineno}")

        start = time.monotonic()
        sys.settrace(note)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.found.seconds[item.nodeid] = time.monotonic() - start
            for place in called:
                self.found.calls.setdefault(place, []).append(item.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.notes.write_text(json.dumps(self.found._asdict()))


def first_failure(copy: Path, tests: Sequence[str], limit: int, *plugins: Observer) -> str | None:
    """The first red line of these tests, or None when all are green within the limit in seconds (0: without limit).

    They run in a fork of this process, which has imported what takes long and nothing of the package.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            signal.alarm(limit)
            code = 1
            try:
                code = run_tests(copy, tests, plugins)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # whatever was raised: the copy is the parent's to remove
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log.seek(0)
        lines = log.read().splitlines()
    if code in (0, COLLECTED_NOTHING):
        return None
    if code == -signal.SIGALRM:
        return f"takes more than {limit} seconds"
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), (lines or [f"exit code {code}"])[-1])


def run_tests(copy: Path, tests: Sequence[str], plugins: Sequence[Observer]) -> int:
    """In the child: the exit code of pytest on the copy's own package."""
    os.chdir(copy)
    here = Path(__file__).resolve().parents[1] / "src"
    sys.path[:] = [str(copy / "src"), *(path for path in sys.path if Path(path).resolve() != here)]
    ignored = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins are imported before pytest asks for them
    code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *ignored, *tests], list(plugins)))
    for package in (copy / "src").iterdir():
        module = sys.modules.get(package.name)
        if module is not None and not str(module.__file__).startswith(str(copy)):
            print(f"ERROR the tests ran on {module.__file__}, not on the copy")
            code = 1
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
