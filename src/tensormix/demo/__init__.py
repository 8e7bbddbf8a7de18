"""The embedded model and the sweep that `tensormix demo` runs on it. How it was trained: studies/embedded_model."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent


def model_folder() -> Path:
    """A small Qwen3 that sits the built-in exam, with its tokenizer; bfloat16, no download."""
    return HERE / "model"


def sweep_file() -> Path:
    return HERE / "sweep.yaml"
