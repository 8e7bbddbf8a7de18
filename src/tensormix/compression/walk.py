"""Walk the blocks once; fit each site on what the part that is compressed already really feeds it.

The walk asks a `Home` for one block at a time: the blocks may stay in the model, or come from the disk and go back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor, nn

from tensormix.compression.choosing import Notes, chooses, settle
from tensormix.compression.fitting import Row, Statistics, check_finite, replace, replace_together
from tensormix.compression.home import Home
from tensormix.compression.slicing import slice_model
from tensormix.compression.streams import Calibration, Stream, observe_part, streams_of
from tensormix.compression.units import groups_of
from tensormix.methods.base import JointMethod, LinearMethod, Method
from tensormix.methods.slice_gpt import SliceGpt
from tensormix.plan import Plan
from tensormix.sites import Site, blocks, find_sites
from tensormix.sites.through import through

Progress = Callable[[int, int, str], None]  # sites done, sites planned, the name of the last one


@torch.no_grad()
def compress(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Tensor] | None = None,
    progress: Progress | None = None,
    *,
    inputs: Stream = "propagated",
    precision: torch.dtype = torch.float64,
) -> list[Row]:
    """Replace the planned sites of `model` in place.

    Args:
        model: any decoder that keeps its blocks in a ModuleList; a transformers model can be saved with
            `save_pretrained` afterwards.
        plan: which site gets which method.
        batches: token ids (B, T) for calibration; needed, and read, only if a method needs them.
        progress: called after each site with the number of sites done, the number planned, and the site's name.
        inputs: "propagated" measures what the compressed part feeds a block, "dense" what the dense model does.
        precision: of the statistics, float64 or float32.

    Returns:
        One row per replaced site. Parameters and MACs are those of the weight (of all parameters for a block), without
        the bias; `relative_error` is ||W' - W|| / ||W|| in the Frobenius norm, None for blocks, for W = 0, and
        for layers that are fitted together.

    Raises:
        ValueError: the plan does not fit the model, a method needs batches and there are none, or a weight or an
            activation is not finite. The block where that was found is unchanged, those before it are compressed.
    """
    calibration = Calibration(batches, inputs, precision)
    if isinstance(plan.whole, SliceGpt):
        with _evaluating(model):
            told = progress or (lambda done, planned, name: None)
            rows = slice_model(model, plan.whole, batches, told, propagated=inputs == "propagated", precision=precision)
    else:
        plan, notes = named(model, plan, Home(), calibration)
        rows = Walk(model, plan, Home(), progress, notes).run(calibration)
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        from tensormix.hf import attach  # here, so that importing this module does not import transformers

        attach(model)
    return rows


def named(model: nn.Module, plan: Plan, home: Home, calibration: Calibration) -> tuple[Plan, Notes]:
    """The plan with its blocks named, where it leaves them to measuring, and what the rows shall say about that.

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
        chosen = plan.resolve(list(self.sites.values()), len(self.layers))
        _check_sizes(model, self.sites, chosen)
        self.num_planned, self.num_done, self._lock = len(chosen), 0, Lock()
        self.chosen: list[dict[str, Method]] = [{} for _ in self.layers]
        for name, method in chosen.items():
            block = self.sites[name].block
            assert block is not None
            self.chosen[block][name] = method

    @property
    def last_observed(self) -> int:
        """The last block whose inputs some method needs; -1 if none does."""
        return max(self._needy, default=-1)

    @property
    def _needy(self) -> list[int]:
        return [i for i, here in enumerate(self.chosen) if any(method.needs for method in here.values())]

    def check_inputs(self, batches: object) -> None:
        """Raise ValueError if a method needs calibration batches and `batches` is None."""
        needy = next((method for here in self.chosen for method in here.values() if method.needs), None)
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
                return [row for index in range(len(self.layers)) for row in self._run_alone(index)]
            threads = torch.get_num_threads()  # a thread starts with another count, and sums depend on it
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
                futures = [pool.submit(self._run_alone, index) for index in range(len(self.layers))]
                try:
                    return [row for future in futures for row in future.result()]
                finally:
                    pool.shutdown(cancel_futures=True)

    @torch.no_grad()  # of the thread that runs it
    def _run_alone(self, index: int) -> list[Row]:
        """One block without any inputs."""
        rows = self.home.finished(index)
        if rows is not None:
            return self._count(rows)
        if self.chosen[index]:
            self.home.enter(index)
        rows = self._fit(index, {})
        self.home.leave(index, rows)
        return rows

    def _run_in_order(self, calibration: Calibration) -> list[Row]:
        streams, rows = streams_of(self.chosen, calibration.inputs), []
        needy = [i for i in self._needy if self.home.finished(i) is None]
        spans = [range(index, index + 1) for index in range(max(needy, default=-1) + 1)]
        keep = calibration.activations.keep
        for part in through(self.model, self.home, calibration.batches or (), keep, streams=streams, spans=spans):
            index, finished = part.span[0], self.home.finished(part.span[0])
            if finished is None:
                new = self._fit(index, observe_part(self.model, part, self.sites, self.chosen[index], calibration))
                part.advance()
                self.home.leave(index, new)
                rows += new
            else:
                if "dense" in streams:  # with the experts open, as before
                    observe_part(self.model, part, self.sites, self.chosen[index], calibration)
                self.home.restore(index)
                part.is_entered = True
                rows += self._count(finished)
        return rows + [row for index in range(len(spans), len(self.layers)) for row in self._run_alone(index)]

    def _fit(self, index: int, stats: Statistics) -> list[Row]:
        here, rows = self.chosen[index], []
        self.home.tidy()
        check_finite(self.sites, here, stats)
        groups = groups_of(self.model, self.sites, here)
        for name, method in here.items():
            site, home = self.sites[name], self.home
            if name in groups:
                new = replace_together(self.model, groups[name], stats, home.dense_bits, home.tidy)
            elif isinstance(method, JointMethod):
                continue  # done with the first site of its group
            else:
                bits = home.dense_bits(site)
                new = [replace(self.model, site, method, stats.pop(name, []), bits, home.tidy)]
            home.tidy()
            rows += self._count([{**row, **self.notes.get(row["site"], {})} for row in new])
        return sorted(rows, key=lambda row: list(here).index(row["site"]))

    def _count(self, rows: list[Row]) -> list[Row]:
        for row in rows:
            with self._lock:
                self.num_done += 1
                self.progress(self.num_done, self.num_planned, row["site"])
        return rows


def _check_sizes(model: nn.Module, sites: Mapping[str, Site], chosen: Mapping[str, Method]) -> None:
    """Raise ValueError, naming the site, if a method cannot work on it: before anything is computed or changed."""
    for name, method in chosen.items():
        if isinstance(method, LinearMethod):
            try:
                method.empty(sites[name].in_features, sites[name].out_features)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    for group in groups_of(model, sites, chosen).values():
        group.empty()


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
