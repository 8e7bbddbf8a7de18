"""Numbers and names for people: units, signs, symbols."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

from tensormix.rows.labels import DIRECTIONS, METHODS

MISSING = "–"
MINUS = "\u2212"
NARROW = "\u00a0"  # a space at which no line breaks


def number(value: Any) -> float | None:
    """A finite number, or None for anything else (missing, null, NaN, text)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def fixed(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def short(value: float | None) -> str:
    """At most four significant digits, no trailing zeros."""
    if value is None:
        return MISSING
    text = f"{value:.4g}"
    if "e" in text and 1e-5 <= abs(value) < 1e7:
        text = f"{value:.0f}" if abs(value) >= 1 else f"{value:.6f}"
    return text.replace("-", MINUS)


def percent(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{100 * value:.{digits}f}{NARROW}%".replace("-", MINUS)


def whole_percent(value: float) -> str:
    return percent(value, 0)


def whole(value: float) -> str:
    """Nothing for what is no whole number: a tick without a name."""
    return f"{value:.0f}" if abs(value - round(value)) < 1e-6 else ""


def change(value: float | None, reference: float | None) -> str:
    """Relative change against a reference, with its sign: "−46.8 %"."""
    if value is None or not reference:
        return MISSING
    delta = 100 * (value / reference - 1)
    if abs(delta) < 0.05:
        return f"±0{NARROW}%"
    return f"{delta:+.1f}{NARROW}%".replace("-", MINUS)


def count(value: float | None) -> str:
    """A count with k, M, B: "226.4 M"."""
    if value is None:
        return MISSING
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.99995:
            return f"{value / size:.4g}{NARROW}{unit}"
    return f"{value:.0f}"


def tick(value: float) -> str:
    """A number beside an axis, where there is room for six characters: from 100,000 on with k, M, B."""
    return count(value).replace("-", MINUS) if abs(value) >= 99_999.5 else short(value)


def bytes_text(value: float | None) -> str:
    """Binary units: "13.1 MiB"."""
    if value is None:
        return MISSING
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power * 0.99995:
            return f"{value / 1024**power:.4g}{NARROW}{unit}"
    return f"{value:.0f} B"


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}{NARROW}ms"


def seconds_text(value: float | None) -> str:
    if value is None:
        return MISSING
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def speed(ratio: float | None) -> str:
    """A dense/compressed time ratio in words; slower is said plainly."""
    if ratio is None:
        return "not measured"
    if abs(ratio - 1) < 0.015:
        return "equally fast (1.00×)"
    return f"{ratio:.2f}× ({'faster' if ratio > 1 else 'slower'})"


def moment(value: Any) -> str:
    """A point in time as written by a stage: seconds since 1970 become a UTC date, text stays text."""
    seconds = number(value)
    if seconds is not None and seconds > 1e6:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return value if isinstance(value, str) else ""


def plural(num: int, word: str) -> str:
    return f"{num} {word}" if num == 1 else f"{num} {word}s"


def series_name(method: str, direction: str, num_branches: Any) -> str:
    """Name of a series in legends: "MixT, 4 branches, front to back"."""
    parts = [METHODS.get(method, method)]
    if num_branches is not None:
        parts.append(plural(int(num_branches), "branch").replace("branchs", "branches"))
    if direction != "last":
        parts.append(DIRECTIONS.get(direction, direction))
    return ", ".join(parts)


def nb(value: str) -> Markup:
    """HTML with N_B set as a symbol."""
    return escape(value).replace("N_B", Markup('<span class="sym">N<sub>B</sub></span>'))


def short_name(model: str) -> str:
    """Last part of a Hub id or folder, for headlines."""
    return model.rstrip("/").rpartition("/")[2] or model
