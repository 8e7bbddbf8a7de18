"""Who may import whom, and what may not be loaded on the way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import tensormix

ROOT = Path(tensormix.__file__).parent

# Imports inside functions and under TYPE_CHECKING count too.
FACTS = {"operators", "sites", "models", "data", "exam", "hf", "files", "settings"}
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "operators": {"kernels"},
    "statistics": set(),
    "files": set(),
    "exam": set(),
    "settings": set(),
    "explain": set(),
    "report": set(),
    "progress": set(),
    "methods": {"allocate", "operators", "statistics"},
    "fused_experts": {"operators"},
    "sites": {"operators", "fused_experts"},
    "sliced": {"operators", "sites"},
    "slicing": set("calls fitting methods operators reparameterise sites sliced statistics".split()),
    "plan": {"methods", "sites"},
    "reparameterise": {"methods", "sites", "sliced", "statistics"},
    "calls": {"sites"},
    "joint": {"methods", "operators", "sites"},
    "fitting": {"joint", "methods", "operators", "sites", "statistics"},
    "selection": {"calls", "methods", "plan", "sites"},
    "walk": {
        "selection",
        "calls",
        "fitting",
        "joint",
        "methods",
        "plan",
        "sites",
        "slicing",
        "hf",
    },  # hf, so that what it made can be saved
    "memory": set(),
    "faster": {"operators"},
    "journal": {"files"},
    "packed": set(),
    "checkpoint": {"files"},
    "assembly": {"checkpoint", "packed"},
    "disk": set("assembly checkpoint files fitting hf joint journal memory methods operators sites walk".split()),
    "stream": {"files", "assembly", "calls", "checkpoint", "disk", "fitting", "models", "plan", "selection", "walk"},
    "hf_packed": {"packed"},
    "allocate": set(),
    "integers": {"operators"},
    "learned": {"methods", "sites"},
    "bits": {"checkpoint", "operators"},
    "while_loading": {"fitting", "hf", "methods", "plan", "sites", "walk"},
    "hf": {"fused_experts", "hf_packed", "operators", "packed", "sites", "sliced"},
    "models": {"hf", "sites", "files", "checkpoint"},
    "recipe": {"plan", "methods", "settings", "explain", "diagnose"},
    "data": {"exam", "files", "settings"},
    "recover": FACTS | {"calls"},
    "evaluate": FACTS,
    "diagnose": FACTS | {"evaluate"},
    "profile": FACTS | {"bits"},
}
MAY_IMPORT["examine"] = {"data", "diagnose", "evaluate", "exam", "plan", "recipe", "settings", "walk"}
MAY_IMPORT["survey"] = set("allocate fitting fused_experts methods operators plan sites statistics walk".split())
MAY_IMPORT["sensitivity"] = {"evaluate", "sites", "survey"}
MAY_IMPORT["budget"] = {"allocate", "assembly", "bits", "calls", "checkpoint", "disk", "methods", "models", "plan"}
MAY_IMPORT["joint_budget"] = {"fitting", "joint", "methods", "operators", "plan", "sites", "walk"}
MAY_IMPORT["budget"] |= {"joint_budget", "learned", "profile", "sensitivity", "settings", "sites", "survey", "walk"}
MAY_IMPORT["comparison"] = {"methods", "plan", "recipe", "settings"}
MAY_IMPORT["search"] = FACTS | {"evaluate", "examine", "memory", "methods", "plan", "recipe", "survey"}
MAY_IMPORT["check"] = set(MAY_IMPORT)
MAY_IMPORT["demo"] = set(MAY_IMPORT)
MAY_IMPORT["run"] = set(MAY_IMPORT)
MAY_IMPORT["family"] = {"diagnose", "models", "profile", "recipe", "run"}
MAY_IMPORT["sweep"] = set(MAY_IMPORT)
MAY_IMPORT["compare"] = set(MAY_IMPORT)
MAY_IMPORT["predict"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)

LIGHT = "operators statistics methods sites plan walk settings recipe models files".split()


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
    lazily = {("walk", "hf")}
    rest = {part: {o for o in others if o != part and (part, o) not in lazily} for part, others in MAY_IMPORT.items()}
    while rest:
        free = [part for part, others in rest.items() if others <= done]
        assert free, f"these import each other: {sorted(rest)}"
        done |= set(free)
        rest = {part: others for part, others in rest.items() if part not in free}


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
