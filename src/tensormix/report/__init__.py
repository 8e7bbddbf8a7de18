"""Run and sweep folders -> one self-contained HTML page.

Reads JSON files only and imports nothing else of tensormix; the page holds its style, its drawings and its data, and
loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .page import write
from .pareto_page import pareto_page
from .read import Contest, Run, Sweep, read_folder
from .run_page import comparison_page, run_page
from .sweep_page import sweep_page

__all__ = ["build_report"]


def build_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page for one sweep, comparison or run folder, or for several run folders together; returns its path.

    Without `out` the page is `report.html` inside the folder, for several folders `report.html` in the current one.
    Unfinished sweeps and runs give a page that says what is missing. Same files, same bytes.
    Raises ValueError for no folder, a folder that is neither run nor sweep, a sweep among several folders, and for JSON
    that is broken (the file is named).
    """
    if isinstance(folders, str | Path):
        raise ValueError(f"report: folders must be a list of folders, got one path; write [{str(folders)!r}]")
    if not folders:
        raise ValueError("report: no folder was given; give one sweep folder, or one or more run folders")
    paths = [Path(folder) for folder in folders]
    sources = [read_folder(path) for path in paths]
    if len(sources) == 1:
        only = sources[0]
        if isinstance(only, Contest):
            page = pareto_page(only)
        else:
            page = sweep_page(only) if isinstance(only, Sweep) else run_page(only)
        target = out or paths[0] / "report.html"
    else:
        runs = [source for source in sources if isinstance(source, Run)]
        sweeps = [path for path, source in zip(paths, sources, strict=True) if not isinstance(source, Run)]
        if sweeps:
            kind = "sweep" if isinstance(sources[paths.index(sweeps[0])], Sweep) else "comparison"
            raise ValueError(
                f"report: {sweeps[0]} is a {kind}, and only runs can be compared; report each {kind} alone, "
                f"or give run folders, for example cells of {sweeps[0]}"
            )
        page = comparison_page(runs)
        target = out or Path("report.html")
    target = Path(target)
    if target.is_dir():
        raise ValueError(f"report: {target} is a folder; give a file, for example {target / 'report.html'}")
    write(target, page.html())
    return target
