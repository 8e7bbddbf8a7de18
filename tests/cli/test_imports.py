"""Nobody waits at the door: what is only asked for help or a list loads no framework, and check only what it needs."""

from __future__ import annotations

import json
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tensormix
from tensormix.cli.verbs import THINGS, listing

SOURCE = str(tensormix.__path__[0]).rpartition("/")[0]
HEAVY = ("torch", "transformers", "numpy", "datasets")
NOT_FOR_CHECK = ("scipy", "sklearn", "pandas", "datasets", "pyarrow", "lm_eval", "matplotlib", "tensormix.recover",
                 "tensormix.report", "tensormix.run.stages")  # fmt: skip


def loaded_by(*words: str) -> tuple[set[str], float]:
    """The modules that a command loads, and its processor time in seconds."""
    code = f"""
import sys; sys.path.insert(0, {SOURCE!r}); sys.argv = ["tensormix", *{list(words)!r}]
from tensormix.cli import main
try: main()
except SystemExit as end: assert not end.code, end.code
import json; print("\\n" + json.dumps(sorted(sys.modules)))
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return set(json.loads(done.stdout.splitlines()[-1])), seconds


@pytest.mark.parametrize("words", [("--help",), ("list",), ("list", "diagnostics", "--json"), ("check", "--help")])
def test_help_and_lists_load_no_framework(words):
    modules, seconds = loaded_by(*words)
    assert not modules & set(HEAVY) and seconds < 0.5


def test_check_loads_only_what_it_needs(tiny, tmp_path):
    recipe = {"model": str(tiny), "plan": [{"method": {"name": "zero"}}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    modules, _ = loaded_by("check", str(tmp_path / "r.yaml"))
    assert "torch" in modules and not modules & set(NOT_FOR_CHECK)


def test_the_lists_are_those_of_the_package():
    shown = {what: listing(what) for what in THINGS}
    made = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "tables.py"))["tables"]()
    assert shown == json.loads(json.dumps(made)), "the tables are old: make tables"
