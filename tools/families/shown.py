"""What the package sees of a model: its matrices, and what is fed to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from configs import NUM_EXPERTS, Tiny
from torch import Tensor, nn
from trying import Refused, asked, batches, error, logits, plan

from tensormix.methods import LinearMethod
from tensormix.operators import Dense
from tensormix.sites import Site, find_sites, is_dense, locate_blocks
from tensormix.sites.sites import unknown_stacks
from tensormix.sites.through import Blocks, through
from tensormix.statistics import Gram


class Same(LinearMethod):
    """Changes nothing."""

    source, summary = "ours", "The layer stays as it is."
    name: Literal["same"] = "same"

    def empty(self, in_features: int, out_features: int) -> Dense:
        with torch.device("meta"):
            return Dense(in_features, out_features)

    def fit(self, weight: Tensor, stats: Any) -> Dense:  # (O, I)
        return Dense.from_dense(weight)


class SameSeen(Same):
    """Changes nothing, but looks at the inputs."""

    needs = (Gram,)
    name: Literal["same_seen"] = "same_seen"  # type: ignore[assignment]


CLIPPED = ("correction_coefs", "prediction_coefs")  # the model changes these weights where they lie


def sites(tiny: Tiny) -> str:
    """Every matrix of a decoder block that text is multiplied by is a site, no other one is, and no router."""
    model, called = tiny.make(), dict[str, nn.Module]()
    root, _ = locate_blocks(model)
    for name, part in model.named_modules():
        if is_dense(part) and re.search(r"\.\d+\.", f".{name}"):
            part.register_forward_hook(lambda part, *_, name=name: called.update({name: part}))
    logits(model, tiny.tokens(8, 16))
    found = {site.name: site for site in _linear(model)}
    routers = {
        name
        for name, part in called.items()
        if out_features(part) in (1, NUM_EXPERTS) or re.search(r"router|\.gate\.", name)
    }
    missed = [name for name in called if name not in found and name not in routers and not name.endswith(CLIPPED)]
    assert not (extra := set(found) - set(called)), f"sites that text is not multiplied by: {some(extra)}"
    assert not (extra := set(found) & routers), f"routers among the sites: {some(extra)}"
    assert not (lost := [name for name in missed if name.startswith(f"{root}.")]), f"matrices missed: {some(lost)}"
    assert not missed, f"matrices outside of {root}, where the blocks were found: {some(missed)}"
    stacks = {
        n
        for n, p in model.named_parameters()
        if n.startswith(f"{root}.") and p.dim() == 3 and p.shape[0] == NUM_EXPERTS
    }
    known = {site.name for site in find_sites(model) if site.kind == "experts"}
    lost = [name for name in stacks if not any(name.startswith(k.rpartition(".")[0]) for k in known)]
    silent = set(lost) - set(unknown_stacks(model))
    assert not silent, f"stacks of experts missed without a word: {some(silent)}"
    assert found, "no sites"
    if lost:
        raise Refused(f"stacks of experts stay dense, as check says: {some(lost)}")
    without = [name for name, site in found.items() if site.role is None]
    return f"{len(found)} matrices, {len(known)} stacks" + (f", without a role: {some(without)}" if without else "")


def _linear(model: nn.Module) -> list[Site]:
    try:
        return [site for site in find_sites(model) if site.kind == "linear"]
    except ValueError as refusal:
        raise Refused(str(refusal)) from refusal


def out_features(part: Any) -> int:
    return part.weight.shape[0] if isinstance(part, nn.Linear) else part.weight.shape[1]


def some(names: Any) -> str:
    """The kinds of names: numbers of blocks left out."""
    return ", ".join(sorted({re.sub(r"\.\d+", "", name) for name in names})[:6])


def inputs(tiny: Tiny) -> str:
    """Gram matrices that the walk over the blocks shows are those of hooks on the whole model."""
    model, x = tiny.make(), batches(tiny)[:1]
    found = _linear(model)
    wanted, seen = ({site.name: Gram(site.in_features) for site in found} for _ in range(2))
    with torch.no_grad():
        watch(model, wanted, lambda: model(input_ids=x[0], use_cache=False))
        try:
            watch(model, seen, lambda: [part.pass_on("dense") for part in through(model, Blocks(), x)])
        except ValueError as refusal:
            raise Refused(str(refusal)) from refusal
    worst = max((error(seen[name].sum, gram.sum), name) for name, gram in wanted.items() if gram.num_tokens)
    assert worst[0] < 1e-3, f"the inputs of {some([worst[1]])} are off by {worst[0]:.1e}"
    return f"off by {worst[0]:.0e} at most"


def watch(model: nn.Module, grams: dict[str, Gram], run: Callable[[], Any]) -> None:
    def update(name: str) -> Any:
        return lambda _, args: grams[name].update(args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(update(name)) for name in grams]
    run()
    for handle in handles:
        handle.remove()


def identity(tiny: Tiny) -> str:
    """A method that changes nothing does so, with data or without, in memory and from files: to the bit the same."""
    worst = 0.0
    for method in (Same(), SameSeen()):
        model = tiny.make()
        before = logits(model, tiny.tokens())
        data = batches(tiny) if method.needs else None
        asked(tiny, model, plan(method=method), data)
        worst = max(worst, error(logits(model, tiny.tokens()), before))
        assert worst < 1e-4, f"{method.name}: the logits are off by {worst:.1e}"
    return f"off by {worst:.0e}"
