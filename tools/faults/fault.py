"""One line of the package, and what it is changed to."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    file: str  # below src/tensormix
    old: str  # stands in the file exactly once
    new: str
    tests: str  # files or folders below tests, separated by spaces
