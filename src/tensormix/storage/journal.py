"""What a walk has finished: a file of JSON lines that survives a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any

from tensormix.storage.files import write_text

Line = dict[str, Any]


class Journal:
    """The first line is the request; each of the others is about one file that stands complete on the disk."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()

    def read(self, request: Line) -> dict[str, Line]:
        """The finished lines by file; none if the journal is of another request, or there is none."""
        if not self.path.exists():
            return {}
        lines: list[Line] = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # the last line, cut off by a kill
                break
        if not lines or lines[0] != json.loads(json.dumps(request)):
            return {}
        return {line["file"]: line for line in lines[1:] if isinstance(line, dict) and "file" in line}

    def start(self, request: Line, finished: Iterable[Line]) -> None:
        """Begin again with what is finished, without the torn line that a kill may have left."""
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in (request, *finished)))

    def append(self, line: Line) -> None:
        """Returns when the line is on the disk."""
        with self._lock, self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
