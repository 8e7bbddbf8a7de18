"""Progress bars for people and plain lines for logs; the estimate is made from what was measured in this very run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PAUSE = 30.0  # seconds after which a line says how far one cell is, where nobody watches


@contextmanager
def stage_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per stage of one run; where nobody watches, a line when a stage is done."""
    with _bars(console) as bars:
        tasks: dict[str, int] = {}
        began: dict[str, float] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks or (done == 0 and bars.tasks[tasks[stage]].finished):
                tasks[stage] = bars.add_task(stage, total=total)  # type: ignore[assignment]
                began[stage] = time.perf_counter()
            bars.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]
            if done == total and not console.is_terminal and stage in began:
                console.print(f"{stage}: {time.perf_counter() - began.pop(stage):.1f} s")

        yield progress


@contextmanager
def cell_bars(console: Console) -> Iterator[Callable[[str, float, float], None]]:
    """One bar for a whole sweep, with the time left by the work done so far; plain lines where nobody watches: at each
    cell, and every half minute within one."""
    with _bars(console, TextColumn("{task.fields[left]}")) as bars:
        task = bars.add_task("sweep", total=1.0, left="")
        began, last, told = time.perf_counter(), [""], [0.0]

        def progress(what: str, done: float, total: float) -> None:
            seconds = time.perf_counter() - began
            left = (
                f"about {duration(seconds * (total - done) / done)} left" if done > 0 and seconds > 2 else "estimating"
            )
            bars.update(task, completed=done, total=total, description=what, left="" if done >= total else left)
            cell = what.partition(":")[0]
            if not console.is_terminal and (cell != last[0] or seconds - told[0] >= PAUSE):
                console.print(f"{100 * done / total:3.0f} %  {duration(seconds)} gone, {left}  {cell}")
                last[0], told[0] = cell, seconds

        yield progress


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextmanager
def _bars(console: Console, *columns: TextColumn) -> Iterator[Progress]:
    shown = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with Progress(*shown, *columns, console=console, disable=not console.is_terminal) as bars:
        yield bars
