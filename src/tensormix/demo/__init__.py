"""The embedded model and the sweep that `tensormix demo` runs on it. How it was trained: studies/embedded_model."""

from __future__ import annotations

from pathlib import Path


def sweep_file() -> Path:
    """The sweep. Its model lies beside it: a small Qwen3 that sits the built-in exam, with its tokenizer; bfloat16."""
    return Path(__file__).parent / "sweep.yaml"
