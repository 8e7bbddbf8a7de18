"""Walk the blocks once; fit each site on what the part that is compressed already really feeds it.

The walk asks a `Home` for one block at a time: the blocks may stay in the model, or come from the disk and go back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import nn

from tensormix.compression.choosing import Notes, chooses, settle
from tensormix.compression.fitting import replace
from tensormix.compression.home import Home
from tensormix.compression.kinds import parts_of, units_of
from tensormix.compression.plain import check_plain, check_untied
from tensormix.compression.slicing import slice_model
from tensormix.compression.streams import Calibration, Stream, observe_part, streams_of
from tensormix.compression.units import Statistics, Unit
from tensormix.plan import Plan
from tensormix.rows import Row
from tensormix.sites import blocks, find_sites
from tensormix.sites.batches import batches_of
from tensormix.sites.locate import uncompiled, unwrapped
from tensormix.sites.through import through

Progress = Callable[[int, int, str], None]  # sites done, sites planned, the name of the last one


@torch.no_grad()
def compress(
    model: nn.Module,
    plan: Plan | Any,
    batches: Any = None,
    progress: Progress | None = None,
    *,
    tokenizer: Any = None,
    inputs: Stream = "propagated",
    precision: torch.dtype = torch.float64,
) -> list[Row]:
    """Replace the planned sites of `model` in place.

    Args:
        model: any decoder that keeps its blocks in a ModuleList; a transformers model can be saved with
            `save_pretrained` afterwards.
        plan: which site gets which method, also as plain data or as the path of a YAML file (`Plan.of`).
        batches: token ids (B, T) for calibration, in any form of `tensormix.sites.batches.batches_of`: padded ones with
            their mask, text with a tokenizer; needed, and read, only if a method needs them.
        tokenizer: of batches that are strings.
        progress: called after each site with the number of sites done, the number planned, and the site's name.
        inputs: "propagated" measures what the compressed part feeds a block, "dense" what the dense model does.
        precision: of the statistics, float64 or float32.

    Returns:
        One row per replaced site. Parameters and MACs are those of the weight (of all parameters for a block), without
        the bias; `relative_error` is ||W' - W|| / ||W|| in the Frobenius norm, None for blocks, for W = 0, and
        for layers that are fitted together.

    Raises:
        ValueError: the plan does not fit the model, an adapter or codes stand in the place of its weights, a method
            needs batches and there are none, or a weight or an activation is not finite. The block where that was found
            is unchanged, those before it are compressed.
    """
    model = unwrapped(model)
    with uncompiled(model):
        check_plain(model)
        plan, batches = Plan.of(plan), batches_of(model, batches, tokenizer)
        calibration = Calibration(batches, inputs, precision)
        if plan.whole is not None:
            with _evaluating(model):
                told, propagated = progress or (lambda done, planned, name: None), inputs == "propagated"
                rows = slice_model(model, plan.whole, batches, told, propagated=propagated, precision=precision)
        else:
            plan, notes = named(model, plan, Home(), calibration)
            rows = Walk(model, plan, Home(), progress, notes).run(calibration)
        if any(hasattr(part, "save_pretrained") for part in model.modules()):
            from tensormix.hf import attach_parts  # here, so that importing this module does not import transformers

            attach_parts(model)
    return rows


def named(model: nn.Module, plan: Plan, home: Home, calibration: Calibration) -> tuple[Plan, Notes]:
    """The plan with its blocks named, where it leaves them to measuring, and what the rows say about that.

    Raises ValueError as `settle` does.
    """
    if not chooses(plan):
        return plan, {}
    if calibration.batches is not None:
        calibration.batches = list(calibration.batches)  # read here and by the walk
    with _evaluating(model):
        return settle(model, plan, home, calibration.batches, calibration.activations.keep)


class Walk:
    """One walk over `model` by `plan`, whose blocks are named. `notes` go into the rows of the sites that they name.

    Raises ValueError, before anything is computed, if model and plan do not fit.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, home: Home, progress: Progress | None = None, notes: Notes | None = None
    ) -> None:
        self.model, self.home, self.progress = model, home, progress or (lambda done, planned, name: None)
        self.notes = notes or {}
        self.layers = blocks(model)
        self.sites = {site.name: site for site in find_sites(model)}
        self.chosen = plan.resolve(list(self.sites.values()), len(self.layers))
        check_untied(model, self.chosen)
        self.units = units_of(model, self.sites, self.chosen)
        self.check_sizes()
        self.parts = parts_of(self.units, len(self.layers))
        self.num_planned, self.num_done, self._lock = len(self.chosen), 0, Lock()

    def check_sizes(self) -> None:
        """Raise ValueError, naming the site, if a method cannot work on it: before anything is computed or changed."""
        for unit in self.units:
            unit.check_sizes()

    def units_in(self, part: range) -> list[Unit]:
        """Those that are fitted while these blocks are in memory."""
        return [unit for unit in self.units if unit.first_block in part]

    @property
    def last_observed(self) -> int:
        """The last block whose inputs some method needs; -1 if none does."""
        return max((unit.last_block for unit in self.units if unit.needs()), default=-1)

    def check_inputs(self, batches: object) -> None:
        """Raise ValueError if a method needs calibration batches and `batches` is None."""
        needy = next((unit.method for unit in self.units if unit.needs()), None)
        if needy is not None and batches is None:
            names = ", ".join(kind.__name__ for kind in needy.needs)
            raise ValueError(f"{needy.name} needs calibration batches ({names}), but none were given")

    @torch.no_grad()
    def run(self, calibration: Calibration, workers: int = 1) -> list[Row]:
        """All blocks; the rows in the order of the sites. `workers` blocks at a time where no inputs are needed."""
        self.check_inputs(calibration.batches)
        with _evaluating(self.model):
            if self.last_observed >= 0:
                return self._run_in_order(calibration)
            if workers == 1:
                return [row for part in self.parts for row in self._run_alone(part)]
            threads = torch.get_num_threads()  # a thread starts with another count, and sums depend on it
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
                futures = [pool.submit(self._run_alone, part) for part in self.parts]
                try:
                    return [row for future in futures for row in future.result()]
                finally:
                    pool.shutdown(cancel_futures=True)

    @torch.no_grad()  # of the thread that runs it
    def _run_alone(self, part: range) -> list[Row]:
        """Blocks without any inputs."""
        rows = self._finished(part)
        if rows is not None:
            return self._count(rows)
        for index in part if self.units_in(part) else ():
            self.home.enter(index)
        rows = self._fit(part, {})
        self._leave(part, rows)
        return rows

    def _run_in_order(self, calibration: Calibration) -> list[Row]:
        streams, rows = streams_of(self.units, calibration.inputs), []
        needy = [p for p in self.parts if self._finished(p) is None and any(u.needs() for u in self.units_in(p))]
        observed = [part for part in self.parts if needy and part.start <= needy[-1].start]
        keep = calibration.activations.keep
        for part in through(self.model, self.home, calibration.batches or (), keep, streams=streams, spans=observed):
            finished, units = self._finished(part.span), self.units_in(part.span)
            if finished is None:
                new = self._fit(part.span, observe_part(self.model, part, self.sites, units, calibration))
                part.advance()
                self._leave(part.span, new)
                rows += new
            else:
                if "dense" in streams:  # with the experts open, as before
                    observe_part(self.model, part, self.sites, units, calibration)
                for index in part.span:
                    self.home.restore(index)
                part.is_entered = True
                rows += self._count(finished)
        return rows + [row for part in self.parts[len(observed) :] for row in self._run_alone(part)]

    def _finished(self, part: range) -> list[Row] | None:
        """The rows of blocks that an earlier walk finished, all of them."""
        found = [self.home.finished(index) for index in part]
        return [row for rows in found for row in rows or ()] if all(rows is not None for rows in found) else None

    def _leave(self, part: range, rows: list[Row]) -> None:
        for index in part:
            self.home.leave(index, [row for row in rows if row["block"] == index])

    def _fit(self, part: range, stats: Statistics) -> list[Row]:
        rows: list[Row] = []
        self.home.tidy()
        units = self.units_in(part)
        for unit in units:
            unit.check(stats)
        for unit in units:
            new = replace(unit, stats, self.home.dense_bits, self.home.tidy)
            self.home.tidy()
            rows += self._count([{**row, **self.notes.get(row["site"], {})} for row in new])
        order = {name: number for number, name in enumerate(self.chosen)}
        return sorted(rows, key=lambda row: (row["block"], order.get(row["site"], len(order))))

    def _count(self, rows: list[Row]) -> list[Row]:
        for row in rows:
            with self._lock:
                self.num_done += row["site"] in self.chosen
                self.progress(self.num_done, self.num_planned, row["site"])
        return rows


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own mode back, and a new one that of the module it replaced."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            while name not in modes:
                name = name.rpartition(".")[0]
            module.training = modes[name]
