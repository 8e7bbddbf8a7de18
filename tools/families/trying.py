"""What a feature is tried on, and what may come of it: right, refused, red, or not tried."""

from __future__ import annotations

import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from configs import Tiny
from torch import Tensor

from tensormix.compression import compress
from tensormix.models import quiet
from tensormix.plan import Plan

HALF = {"name": "svd", "keep": 0.6}  # narrow layers have no rank for less


class Refused(Exception):
    """tensormix said no, and the model is as it was."""


class NotTried(Exception):
    """The dense model itself does not do it."""


class Late(Exception):
    pass


def plan(**rule: Any) -> Plan:
    return Plan.model_validate([rule])


def batches(tiny: Tiny) -> list[Tensor]:
    return [tiny.tokens(rows=6, length=16, seed=seed) for seed in (1, 2)]


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **options: Any) -> Tensor:  # (B, T) -> (B, T, V)
    return model(input_ids=tokens, **options).logits


def error(found: Tensor, wanted: Tensor) -> float:
    """The distance of the logits, as a part of the length of those that are wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def asked(tiny: Tiny, model: Any, rules: Plan, data: list[Tensor] | None = None) -> None:
    """Compress `model`. Raises Refused if that is refused, AssertionError if something was changed all the same."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        compress(model, rules, data)
    except ValueError as refusal:
        after = model.state_dict()
        same = set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
        assert same, f"refused after something was changed: {refusal}"
        raise Refused(str(refusal)) from refusal


def dense(try_it: Callable[[], Any]) -> Any:
    """What the dense model does. Raises NotTried if it fails."""
    try:
        return try_it()
    except Exception as failure:
        raise NotTried(f"the dense model fails: {short(failure)}") from failure


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def answer(feature: Callable[[Tiny], str], tiny: Tiny, seconds: int) -> dict[str, str]:
    """One of the four answers, and its number or sentence."""

    def late(*_: Any) -> None:
        raise Late(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        with quiet():
            return {"answer": "right", "says": feature(tiny)}
    except Refused as refusal:
        return {"answer": "refused", "says": str(refusal)}
    except NotTried as reason:
        return {"answer": "not tried", "says": str(reason)}
    except Exception as failure:
        return {"answer": "red", "says": short(failure)}
    finally:
        signal.alarm(0)


def short(failure: Exception) -> str:
    """The kind of the failure, its first words and the place where it came from."""
    place = traceback.extract_tb(failure.__traceback__)[-1]
    words = " ".join(str(failure).split())[:240]
    return f"{type(failure).__name__}: {words} ({'/'.join(Path(place.filename).parts[-2:])}:{place.lineno})"
