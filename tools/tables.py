"""Write src/tensormix/cli/tables.json: what `tensormix list` shows, which nobody should wait for imports to see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "src" / "tensormix" / "cli" / "tables.json"


def tables() -> dict[str, list[dict[str, Any]]]:
    """The tables of the package itself as plain data."""
    from tensormix.diagnose import DIAGNOSTICS
    from tensormix.exam import SUBJECTS
    from tensormix.methods import METHODS
    from tensormix.operators import OPERATORS
    from tensormix.rows import STAGES
    from tensormix.statistics import STATISTICS

    documented: dict[str, dict[str, Any]] = {
        "operators": OPERATORS, "statistics": STATISTICS, "diagnostics": DIAGNOSTICS,
    }  # fmt: skip
    return {
        "methods": [
            {
                "name": name,
                "source": method.source,
                "sites": method.takes,
                "needs": [statistic.__name__ for statistic in method.needs],
                "summary": method.summary,
            }
            for name, method in METHODS.items()
        ],
        **{what: [_summary(*pair) for pair in table.items()] for what, table in documented.items()},
        "stages": [{"name": name} for name in STAGES],
        "subjects": [{"name": name} for name in SUBJECTS],
    }


def _summary(name: str, item: Any) -> dict[str, str]:
    return {"name": name, "summary": (item.__doc__ or "").strip().splitlines()[0]}


def written() -> str:
    return json.dumps(tables(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
