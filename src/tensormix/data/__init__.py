"""Text from files, the Hub or the exam, turned into windows of tokens, all of which count or only the answers."""

from __future__ import annotations

from tensormix.data.documents import Document, describe, read_documents, understood_by
from tensormix.data.windows import (
    IGNORED,
    Mixture,
    calibration_batches,
    encode,
    pack,
    packed_source,
    separator_of,
    windows_of,
)

__all__ = [
    "IGNORED",
    "Document",
    "Mixture",
    "calibration_batches",
    "describe",
    "encode",
    "pack",
    "packed_source",
    "read_documents",
    "separator_of",
    "understood_by",
    "windows_of",
]
