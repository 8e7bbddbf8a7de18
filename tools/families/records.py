"""The first part of docs/families.md: which family of models supports what, tried on the tiny models of the tests.

A feature that a family's record promises must work, or this fails; what is refused is refused with a sentence.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402

from tensormix.compression import compress  # noqa: E402
from tensormix.compression.checkpoint import compress_checkpoint  # noqa: E402
from tensormix.models import load_model, quiet  # noqa: E402
from tensormix.plan import Plan  # noqa: E402
from tensormix.reparameterise import residual_basis, rotate_pairs, rotate_residual  # noqa: E402
from tensormix.sites import blocks, find_sites  # noqa: E402
from tensormix.sites.calls import record_calls  # noqa: E402
from tensormix.sites.families import FAMILIES, Family  # noqa: E402
from zoo import MOE, ZOO, logits, make, token_ids  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
INTRODUCTION = """\
Written by `python tools/families`, which tries every feature on a tiny model of every family in
`tests/zoo.py`. All that is known of an architecture is one record in `src/tensormix/sites/families.py`;
a new family is one record there and one line in the zoo. Models of other families are compressed matrix by
matrix all the same, if their layers have names that are known there."""
BATCHES = [token_ids(rows=6, length=10)]


def close(model: Any, before: torch.Tensor) -> None:
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


def plan(blocks_: str = "all", sites: str | None = None, **method: Any) -> Plan:
    return Plan.model_validate([{"blocks": blocks_, "sites": sites, "method": method}])


def walk(family: str) -> None:
    """Every block, called as the model calls it, hands on what it does inside the model."""
    model: Any = make(family)
    states = model(BATCHES[0], output_hidden_states=True, use_cache=False).hidden_states
    calls = record_calls(model, BATCHES)
    for index, block in enumerate(list(blocks(model))[:-1]):
        torch.testing.assert_close(calls[index][0].run(block, states[index]), states[index + 1])


def save_and_load(family: str) -> None:
    """A compressed model comes back from its folder as it was."""
    model = make(family)
    compress(model, plan("1", name="svd", keep=0.5))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert torch.equal(logits(load_model(folder)), logits(model))


def from_files(family: str) -> None:
    """From files into files gives what is made in memory."""
    model = make(family)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "dense")
        compress_checkpoint(Path(folder) / "dense", Path(folder) / "out", plan("1", name="svd", keep=0.5))
        compress(model, plan("1", name="svd", keep=0.5))
        assert torch.equal(logits(load_model(Path(folder) / "out")), logits(model))


def dropped_blocks(family: str) -> None:
    """A model without two of its blocks is saved and loaded."""
    model = make(family)
    compress(model, plan("1,2", name="drop_blocks"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert torch.equal(logits(load_model(folder)), logits(model))


def turned_stream(family: str) -> None:
    """The residual stream in its principal basis: the logits stay."""
    model = make(family)
    before = logits(model)
    rotate_residual(model, residual_basis(model, BATCHES))
    close(model, before)


def sliced_stream(family: str) -> None:
    """A sliced stream that keeps all channels: the logits stay."""
    model = make(family)
    before = logits(model)
    compress(model, plan(name="slice_gpt", keep_channels=1.0), BATCHES)
    close(model, before)


def turned_pairs(family: str) -> None:
    """Rotary pairs of queries and keys aligned: the logits stay."""
    model = make(family)
    before = logits(model)
    grams = {site.name: torch.eye(site.in_features).double() for site in find_sites(model) if site.kind == "linear"}
    if not rotate_pairs(model, grams):
        raise ValueError("there is no attention of known heads")
    close(model, before)


def joint(family: str) -> None:
    """Heads and neurons cut together, by flat_llm: fewer of them, in every block."""
    compress(make(family), plan(name="flat_llm", keep=0.6), BATCHES)


def experts(family: str) -> None:
    """Stacks of experts become operators, and come back from their folder."""
    model = make(family)
    compress(model, plan("1", r".*experts.*", name="svd", keep=0.5))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = load_model(folder)
    # Where a loaded tensor lies in memory decides in which order a CPU adds its products: the numbers are equal to
    # the bit, what is computed from them is equal but for rounding.
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    close(loaded, logits(model))


# Column -> what is tried, and whether the record promises it.
FEATURES: dict[str, tuple[Callable[[str], None], Callable[[Family], bool]]] = {
    "blocks alone": (walk, lambda record: True),
    "save, load": (save_and_load, lambda record: True),
    "from files": (from_files, lambda record: True),
    "dropped blocks": (dropped_blocks, lambda record: True),
    "experts": (experts, lambda record: False),
    "joint methods": (joint, lambda record: False),
    "turned stream": (turned_stream, lambda record: bool(record.stream_norms)),
    "sliced stream": (sliced_stream, lambda record: bool(record.halves)),
    "turned pairs": (turned_pairs, lambda record: record.pairs is not None),
}
OF_RECORDS = ("turned stream", "sliced stream", "turned pairs")  # what cannot be without a record


def supports(family: str, feature: str) -> bool:
    """Whether it works; AssertionError if it gives wrong numbers, or is refused though the record promises it."""
    tried, promised = FEATURES[feature]
    try:
        with torch.no_grad(), quiet():
            tried(family)
    except ValueError as refusal:
        record = FAMILIES.get(block_class(family), Family())
        assert not promised(record), f"{family}: {feature} is refused, but its record promises it: {refusal}"
        return False
    return True


def block_class(family: str) -> str:
    return type(blocks(make(family))[0]).__name__


def page(table: dict[str, dict[str, bool]]) -> str:
    head = ["family", "block", *FEATURES]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for family, found in table.items():
        marks = ("yes" if found[feature] else "-" for feature in FEATURES)
        lines.append(f"| {family} | `{block_class(family)}` | {' | '.join(marks)} |")
    what = [f"* *{feature}*: {(tried.__doc__ or '').strip()}" for feature, (tried, _) in FEATURES.items()]
    return "\n".join(
        [
            "# Which family of models supports what",
            "",
            INTRODUCTION,
            "",
            *lines,
            "",
            *what,
            "",
        ]
    )


def all_records() -> dict[str, dict[str, bool]]:
    return {family: {feature: supports(family, feature) for feature in FEATURES} for family in (*ZOO, *MOE)}
