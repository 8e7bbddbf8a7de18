"""The table of faults speaks of today's code; the faults themselves are run by `python tools/mutate.py`."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "mutate.py"


@pytest.fixture(scope="module")
def mutate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_line_of_every_fault_stands_in_its_file_exactly_once(mutate):
    source = mutate.ROOT / "src" / "tensormix"
    texts = {fault.file: (source / fault.file).read_text(encoding="utf-8") for fault in mutate.FAULTS}
    counts = {fault: texts[fault.file].count(fault.old) for fault in mutate.FAULTS}
    stale = [f"{fault.file}: {fault.old!r} stands there {n} times" for fault, n in counts.items() if n != 1]
    assert not stale, "faults that no longer apply:\n" + "\n".join(stale)


def test_every_fault_leaves_python_that_compiles_and_differs(mutate):
    """A syntax error turns any test red, so such a fault would prove nothing about its tests."""
    for fault in mutate.FAULTS:
        text = (mutate.ROOT / "src" / "tensormix" / fault.file).read_text(encoding="utf-8")
        assert fault.new != fault.old
        if fault.file.endswith(".py"):
            compile(text.replace(fault.old, fault.new), fault.file, "exec")


def test_the_tests_that_should_notice_exist(mutate):
    for fault in mutate.FAULTS:
        for name in fault.tests.split():
            assert (mutate.ROOT / "tests" / name).exists(), f"{fault.file} names tests/{name}, which is not there"
