"""tools/mutate.py finds what a test does not notice, in a package of one function."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"

BEFORE = "def other(x):\n    return x + 1\n\n\ndef inside(x, low, high):\n    return low <= x\n"
AFTER = BEFORE.replace("return low <= x\n", "return low <= x and x < high\n")
WEAK = "from small.room.limits import inside\n\n\ndef test_inside():\n    assert inside(2, 1, 3)\n"
ENDS = "    assert inside(1, 1, 3) and not inside(0, 1, 3) and not inside(3, 1, 3)\n"


@pytest.fixture
def small(tmp_path):
    """A repository whose last change is not committed."""
    room, tests = tmp_path / "src" / "small" / "room", tmp_path / "tests" / "room"
    room.mkdir(parents=True)
    tests.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["src"]\n')
    (room.parent / "__init__.py").touch()
    (room / "limits.py").write_text(BEFORE)
    (tests / "test_limits.py").write_text(WEAK)
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "before"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (room / "limits.py").write_text(AFTER)
    return tmp_path


def mutate(folder, *words):
    command = [sys.executable, str(TOOLS / "mutate.py"), *words]
    plain = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # each change would import all plugins anew
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=plain)
    assert not done.stderr, done.stderr
    unseen = done.stdout.split("unnoticed\n")[-1] if done.returncode else ""
    return done.returncode, unseen.splitlines()


def test_a_weak_test_is_found_and_a_strong_one_is_not(small):
    code, unseen = mutate(small)
    assert code == 1
    assert all(line.startswith("src/small/room/limits.py:6: ") for line in unseen), "only the changed line is broken"
    assert any("'x < high' -> '(x <= high)'" in line for line in unseen)
    assert not any("(x >= high)" in line for line in unseen)
    with (small / "tests" / "room" / "test_limits.py").open("a") as file:
        file.write(ENDS)
    assert mutate(small) == (0, [])


def test_what_no_test_calls_is_said(small):
    code, unseen = mutate(small, "--base", "", "src/small/room")
    assert code == 1
    assert any("limits.py:2: 'x + 1' -> '(x - 1)' (no test in tests/room calls it)" in line for line in unseen)


def test_every_kind_of_break_is_tried(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    mutations = importlib.import_module("mutations").mutations
    lines = ["def f(x, y):", "    '''words'''", "    x.go(1, deep=True)", "    if x.fine():", "        y += x * 2",
             "    return [z for z in y if z]", "", "", "def g(x):", "    return f'{x + 1}'"]  # fmt: skip
    found = list(mutations("\n".join(lines), ()))
    tried = {(one.old, one.new) for one in found}
    assert {
        ("x.go(1, deep=True)", "pass"),
        ("x.go(1, deep=True)", "(x.go(1))"),
        ("x.fine()", "(not x.fine())"),
        ("x.fine()", "(x)"),
        ("y += x * 2", "pass"),
        ("x * 2", "(x / 2)"),
        ("2", "(3)"),
        ("True", "(False)"),
        ("z", "(True)"),
    } <= tried
    assert {one.function for one in found} == {1}, "an f-string is left as it is"
    for one in found:
        assert ast.dump(ast.parse(one.source)) != ast.dump(ast.parse("\n".join(lines)))
    assert {one.line for one in mutations("\n".join(lines), [5])} == {5}
