"""Who may import whom, and what may not be loaded on the way."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import tensormix

ROOT = Path(tensormix.__file__).parent

# A part is a file or a folder of the package. Imports inside functions and under TYPE_CHECKING count too.
FACTS = {"operators", "sites", "models", "data", "exam", "hf", "storage", "settings"}
MAY_IMPORT: dict[str, set[str]] = {
    # what everything stands on
    "kernels": set(),
    "statistics": set(),
    "exam": set(),
    "settings": set(),
    "rows": set(),
    "report": {"rows"},
    "clock": set(),
    "operators": {"kernels"},
    "fitting": {"operators"},
    "storage": {"operators"},
    "inference": {"clock", "operators", "sites"},
    "methods": {"fitting", "operators", "statistics"},
    # models
    "sites": {"operators"},
    "reparameterise": {"fitting", "methods", "operators", "plan", "sites", "statistics"},
    "hf": {"operators", "sites", "storage"},
    "models": {"hf", "sites", "storage"},
    "explain": set(),
    "reading": {"explain"},
    "plan": {"methods", "reading", "sites"},
    # what is done to a model: compressed by a plan, or measured by stages that never know of one
    "compression": {
        "fitting", "hf", "methods", "models", "operators", "plan", "reparameterise", "sites", "statistics", "storage",
    },
    "data": {"exam", "settings", "storage"},
    "recover": FACTS,
    "evaluate": FACTS,
    "profile": FACTS | {"clock"},
    "diagnose": FACTS | {"evaluate"},
    # what is asked for, and carried out
    "recipe": {"diagnose", "methods", "plan", "reading", "settings"},
}  # fmt: skip
for part in set(MAY_IMPORT) - {"kernels", "exam", "settings"}:
    MAY_IMPORT[part].add("rows")
MAY_IMPORT |= {"rows": set(), "version": set()}
MAY_IMPORT["compression"].add("version")
MAY_IMPORT["allocation"] = set(MAY_IMPORT) - {"inference", "recover", "report"}
MAY_IMPORT["run"] = set(MAY_IMPORT)
MAY_IMPORT["sweep"] = set(MAY_IMPORT)
MAY_IMPORT["demo"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)

LIGHT = "operators statistics methods sites plan compression settings recipe models storage.files".split()


def imported_parts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path}: a relative import may not leave its folder"
            if node.level == 1:
                assert path.parent != ROOT, f"{path}: write imports in full, from tensormix..."
                continue
            if node.module == "tensormix":
                yield from (alias.name for alias in node.names)
            names = [node.module or ""]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[1] for name in names if name.startswith("tensormix."))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_point_one_way():
    parts = {part_of(path) for path in ROOT.rglob("*.py")}
    for path in ROOT.rglob("*.py"):
        part = part_of(path)
        if part in ("__init__", "__main__"):
            continue
        assert part in MAY_IMPORT, f"{part} has no line in MAY_IMPORT: say what it may import"
        forbidden = set(imported_parts(path)) & parts - MAY_IMPORT[part] - {part}
        allowed = sorted(MAY_IMPORT[part])
        assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}; {part} may import {allowed}"


def test_the_rules_themselves_have_no_circle():
    done: set[str] = set()
    rest = {part: others - {part} for part, others in MAY_IMPORT.items()}
    while rest:
        free = [part for part, others in rest.items() if others <= done]
        assert free, f"these import each other: {sorted(rest)}"
        done |= set(free)
        rest = {part: others for part, others in rest.items() if part not in free}


# What one reads at once, in the package and beside it. A function's docstring does not count.
MOST_LINES, MOST_OF_A_FUNCTION = 300, 40


def test_files_are_short_enough_to_be_read():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    long = {str(path): n for path, n in lines.items() if n > MOST_LINES}
    assert lines and not long, f"more than {MOST_LINES} lines: {long}; split them where two subjects meet"


def python_files() -> Iterator[Path]:
    """Those of the package, and what stands beside it."""
    beside = Path(__file__).parents[1]
    for folder in (ROOT, *(beside / name for name in ("tests", "tools", "studies", "benchmarks", "examples"))):
        yield from folder.rglob("*.py")


def test_functions_are_short_enough_to_be_read():
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0] if ast.get_docstring(node) else None
                docstring = 0 if first is None else (first.end_lineno or 0) - first.lineno + 1
                lines = (node.end_lineno or 0) - node.lineno + 1 - docstring
                assert lines <= MOST_OF_A_FUNCTION, f"{path}: {node.name} has {lines} lines"


def test_scripts_import_what_is_there():
    """Their own tests run on demand only, so a name that moved is found here."""
    beside = Path(__file__).parents[1]
    scripts = [
        path for name in ("tools", "studies", "benchmarks", "examples") for path in (beside / name).rglob("*.py")
    ]
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tensormix":
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not is_in(module, alias.name)]
                assert not missing, f"{path}: {node.module} has no {missing}"


def is_in(module: ModuleType, name: str) -> bool:
    return hasattr(module, name) or importlib.util.find_spec(f"{module.__name__}.{name}") is not None


def run_python(code: str) -> str:
    code = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r})\n{code}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_are_light():
    """transformers takes seconds to import, and a plan or an operator needs none of it."""
    names = ", ".join(f"tensormix.{name}" for name in LIGHT)
    heavy = ("transformers", "matplotlib", "datasets")
    code = f"import tensormix, {names}\nprint([name for name in {heavy} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_the_package_itself_does_not_even_import_torch():
    assert run_python("import tensormix\nprint('torch' in sys.modules)") == "False"
