"""Methods that fit several layers, a stream or a block together, at a size at which they have little to lose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from configs import Tiny
from trying import NotTried, Refused, asked, batches, dense, error, logits, plan

from tensormix.reparameterise import residual_basis, rotate_pairs, rotate_residual
from tensormix.sites import find_sites

# Factors of q and k lose much of random weights at any size, so that all layers together say little but that it ran.
PARTS: dict[str, list[str] | None] = {"values": ["v", "o"], "neurons": ["gate", "up", "gate_up", "down"], "all": None}


BOUNDS = {"values": 0.5, "neurons": 0.5, "all": 1.2}


def joint(name: str, **settings: Any) -> Callable[[Tiny], str]:
    """A method of several layers at nearly full size: of values, of neurons, and of all that it knows."""

    def feature(tiny: Tiny) -> str:
        done, refusals = [], []
        for part, roles in PARTS.items():
            if name == "sola" and part == "values":  # it makes factors of o, and leaves v
                continue
            model = tiny.make()
            before = logits(model, tiny.tokens())
            try:
                asked(tiny, model, plan(method={"name": name, **settings}, sites=roles), batches(tiny))
            except Refused as refusal:
                refusals.append(str(refusal))
                continue
            off = error(logits(model, tiny.tokens()), before)
            assert off < BOUNDS[part], f"{part}: the logits are off by {off:.2f}"
            done.append(f"{part} off by {off:.2f}")
        if not done:
            raise Refused(refusals[-1])
        return ", ".join(done) + (f", else: {refusals[-1]}" if refusals else "")

    return feature


def exact(bound: float, **rule: Any) -> Callable[[Tiny], str]:
    """A method that has nothing to lose at its full size."""

    def feature(tiny: Tiny) -> str:
        model = tiny.make()
        before = logits(model, tiny.tokens())
        asked(tiny, model, plan(**rule), batches(tiny))
        off = error(logits(model, tiny.tokens()), before)
        assert off < bound, f"the logits are off by {off:.1e}"
        return f"off by {off:.0e}"

    return feature


def turned_stream(tiny: Tiny) -> str:
    """The residual stream in its principal basis: the logits stay."""
    return turned(tiny, lambda model: rotate_residual(model, residual_basis(model, batches(tiny))))


def turned_pairs(tiny: Tiny) -> str:
    """Rotary pairs of queries and keys aligned: the logits stay."""

    def turn(model: Any) -> None:
        grams = {s.name: torch.eye(s.in_features).double() for s in find_sites(model) if s.kind == "linear"}
        if not rotate_pairs(model, grams):
            raise ValueError("there is no attention of known heads")

    return turned(tiny, turn)


def turned(tiny: Tiny, turn: Callable[[Any], Any]) -> str:
    model = tiny.make()
    before = dense(lambda: logits(model, tiny.tokens()))
    if error(dense(lambda: logits(model, tiny.tokens())), before) > 0:
        raise NotTried("the dense model answers another time with other logits")
    try:
        turn(model)
    except ValueError as refusal:
        assert error(logits(model, tiny.tokens()), before) < 1e-6, f"refused after something was changed: {refusal}"
        raise Refused(str(refusal)) from refusal
    off = error(logits(model, tiny.tokens()), before)
    assert off < 1e-3, f"the logits are off by {off:.1e}"
    return f"off by {off:.0e}"
