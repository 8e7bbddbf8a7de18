"""The table of faults speaks of today's code; the faults themselves are run by `python tools/mutate.py`."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tensormix"


@pytest.fixture(scope="module")
def faults() -> Any:
    """The rows of the table."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("faults").FAULTS
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_the_line_of_every_fault_stands_in_its_file_exactly_once(faults):
    texts = {fault.file: (SOURCE / fault.file).read_text(encoding="utf-8") for fault in faults}
    counts = {fault: texts[fault.file].count(fault.old) for fault in faults}
    stale = [f"{fault.file}: {fault.old!r} stands there {n} times" for fault, n in counts.items() if n != 1]
    assert not stale, "faults that no longer apply:\n" + "\n".join(stale)


def test_every_fault_leaves_python_that_compiles_and_differs(faults):
    """A syntax error turns any test red, so such a fault would prove nothing about its tests."""
    for fault in faults:
        text = (SOURCE / fault.file).read_text(encoding="utf-8")
        assert fault.new != fault.old
        if fault.file.endswith(".py"):
            compile(text.replace(fault.old, fault.new), fault.file, "exec")


def test_the_tests_that_should_notice_exist(faults):
    for fault in faults:
        for name in fault.tests.split():
            assert (ROOT / "tests" / name).exists(), f"{fault.file} names tests/{name}, which is not there"
