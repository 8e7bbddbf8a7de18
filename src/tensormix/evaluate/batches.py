"""How many items are read at a time: as many as the memory holds, and no more than pay.

Items are worked on in order, each once. Where the memory does not suffice, half as many are tried, down to one. With
"auto" the number also grows: it is doubled as long as twice as many get through GAIN times as much in a second, and
never to what did not fit. What is measured does not depend on it but for the rounding of sums.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar, cast

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Asked = int | Literal["auto"]
START = 32  # where "auto" begins
GAIN = 1.1  # what twice as many have to get through in a second, at least, times as much
TRIALS = 2  # batches by which a size is judged; the first pass of all is slow


class BatchSize:
    """The number of items at a time. `size` is the one that is in use.

    Args:
        asked: a number, which is only ever lowered, or "auto".
        clock: seconds, for tests.
    """

    def __init__(self, asked: Asked | BatchSize, clock: Callable[[], float] = time.perf_counter) -> None:
        self.size = START if asked == "auto" else asked.size if isinstance(asked, BatchSize) else asked
        self._growing = asked == "auto"
        self._clock = clock
        self._too_many: int | None = None  # did not fit
        self._rates: dict[int, list[float]] = {}  # size -> work in a second, of each trial

    def each(
        self,
        items: Sequence[Item],
        work: Callable[[Sequence[Item], int], Result],
        *,
        cost: Callable[[Sequence[Item]], float] = len,
        batches: int = 1,
    ) -> Iterator[tuple[Sequence[Item], Result]]:
        """Pieces of `items` with work(piece, size), in order.

        `cost` says how much work a piece is; `batches` is how many of them `work` reads in one call. Raises what work
        raises with one item at a time.
        """
        done = 0
        while done < len(items):
            piece, began = items[done : done + self.size * batches], self._clock()
            try:
                result, fits = work(piece, self.size), True
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if self.size == 1 or not _out_of_memory(error):
                    raise
                result, fits = None, False
            if not fits:
                self._shrink()
                continue
            whole = len(piece) == self.size * batches
            if whole and self._growing:
                self._judge(cost(piece) / max(self._clock() - began, 1e-9))
            done += len(piece)
            yield piece, cast(Result, result)

    def _shrink(self) -> None:
        gc.collect()  # outside the handler, where the traceback would keep the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._too_many, self.size = self.size, self.size // 2

    def _judge(self, rate: float) -> None:
        """Double, stay or go back, once this size has been tried often enough."""
        rates = self._rates.setdefault(self.size, [])
        rates.append(rate)
        if len(rates) < TRIALS:
            return
        before = self._rates.get(self.size // 2)
        if before and max(rates) < GAIN * max(before):
            self.size, self._growing = self.size // 2, False
        elif self._too_many is not None and 2 * self.size >= self._too_many:
            self._growing = False
        else:
            self.size *= 2


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
