"""Which version of the package this is, and which code: results of other code are never taken for finished."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

__version__ = "0.1.0"

_PACKAGE = Path(__file__).parent
_WITHOUT_A_SAY = {"cli", "demo", "report"}  # rooms that no stage calls


@cache
def code_version() -> str:
    """The version with a digest of all code that a stage could run: "0.1.0+3f2a..."."""
    digest = hashlib.sha256()
    for file in sorted(file for kind in ("*.py", "*.yaml") for file in _PACKAGE.rglob(kind)):
        name = file.relative_to(_PACKAGE)
        if name.parts[0] not in _WITHOUT_A_SAY:
            content = file.read_bytes()
            digest.update(f"{name.as_posix()} {len(content)} ".encode() + content)
    return f"{__version__}+{digest.hexdigest()[:16]}"
