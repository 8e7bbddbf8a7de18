"""What methods and directions are called where people read them."""

from __future__ import annotations

from collections.abc import Mapping

METHODS = {
    "mixt": "MixT",
    "zero": "zeroed linears",
    "drop_blocks": "dropped blocks",
    "mean_output": "mean output",
    "svd": "low rank (SVD)",
    "svd_llm": "low rank (SVD-LLM)",
    "coala": "low rank (COALA)",
    "laser": "low rank (LASER)",
    "hassle_free": "sparse + low rank (HASSLE-free)",
    "rtn": "round to nearest",
}
DIRECTIONS = {
    "last": "back to front",
    "first": "front to back",
    "middle_out": "middle out",
    "middle_to_late": "middle to late",
    "single": "one block at a time",
    "blocks": "listed blocks",
}


def variant(method: str, settings: Mapping[str, object]) -> str:
    """A method of a sweep; with more settings than `num_branches` also those: "low rank (SVD), keep 0.5"."""
    said = [f"{name} {value}" for name, value in settings.items() if name != "num_branches"]
    return ", ".join([METHODS.get(method, method), *said]) if said else method


def series(method: str, settings: Mapping[str, object], direction: str) -> str:
    """A series of a sweep, in legends: "MixT, 4 branches, front to back"."""
    parts, branches = [METHODS.get(method, method)], settings.get("num_branches")
    parts += [] if branches is None else [f"{branches} branch{'' if branches == 1 else 'es'}"]
    parts += [f"{name} {value}" for name, value in settings.items() if name != "num_branches"]
    return ", ".join(parts + ([] if direction == "last" else [DIRECTIONS.get(direction, direction)]))


def text_name(row: Mapping[str, object]) -> str:
    """A text that was measured, with what it is to the recovery, where a recipe says it."""
    domain = row.get("domain")
    return f"{row['text']} ({str(domain).replace('_', '-')})" if domain else str(row["text"])
