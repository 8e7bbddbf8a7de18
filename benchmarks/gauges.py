"""What a measurement is read from: other processes, the profiler, the memory of this process. Linux only."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

PROFILED = 0.2  # seconds of calls from which the shares of a case are taken

Call = Callable[[], Any]


class OthersCPU:
    """How many cores other processes keep busy between entering and leaving."""

    def __enter__(self) -> OthersCPU:
        self.start = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        wall, others = (b - a for a, b in zip(self.start, self._read(), strict=True))
        self.cores = max(0.0, others / wall)

    @staticmethod
    def _read() -> tuple[float, float]:
        with open("/proc/stat") as lines:
            fields = [int(field) for field in lines.readline().split()[1:9]]
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.perf_counter(), busy - own.user - own.system


def wait_for_others(limit: float, seconds: float = 60) -> None:
    """Until other processes use less than `limit` of a core, or for so many seconds."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        with OthersCPU() as others:
            time.sleep(1)
        if others.cores < limit:
            return


def shares(call: Call) -> dict[str, float]:
    """Of the time of some calls, the share of each of PyTorch's own operations; what is missing lies between them."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        start = time.perf_counter()
        while time.perf_counter() - start < PROFILED:
            call()
        wall = 1e6 * (time.perf_counter() - start)
    spent = {event.key: event.self_cpu_time_total / wall for event in trace.key_averages()}
    return {name: round(share, 4) for name, share in spent.items() if share >= 0.005}


def peak_bytes(call: Call) -> int:
    """How far one call raises the resident memory of this process: libraries' own buffers are in it (Linux)."""
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    before = _resident("VmRSS")
    made = call()
    peak = _resident("VmHWM") - before
    del made
    return peak


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
