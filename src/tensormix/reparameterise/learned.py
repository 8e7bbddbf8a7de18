"""The free bases in which given operators fit best, learned on the inputs of the layers that they will replace.

Shape letters: B sequences, T tokens, D hidden size, C head size, G key-value heads, O out_features, I in_features,
K directions of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.fitting.whitening import gram_root
from tensormix.methods import LinearMethod
from tensormix.operators import StructuredLinear
from tensormix.plan import Plan
from tensormix.reparameterise.equality import check_equal
from tensormix.reparameterise.heads import Attention, attentions
from tensormix.reparameterise.residual import find_stream, ones_and_last, rotate_residual
from tensormix.reparameterise.values import check_values, map_values
from tensormix.sites import Site, blocks, find_sites
from tensormix.sites.batches import batches_of
from tensormix.sites.families import WRITES
from tensormix.statistics import Gram

Term = Callable[[Tensor], Tensor]  # the rotation of the stream (D, D) -> the relative squared error of one layer


@torch.no_grad()
def learn_bases(
    model: nn.Module,
    methods: Mapping[str, LinearMethod],
    batches: Iterable[Tensor],
    *,
    steps: int = 200,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # (B, T) each
    """Turn the residual stream, and the values of each head, so that `methods` lose least; the model computes the same.

    The operators of all sites and the rotations are lowered together, by L-BFGS in float32, on the sum of the relative
    squared errors of the outputs on the inputs of the dense model: ||(W - W') S||^2 / ||W S||^2 with S S^T their Gram
    matrix. The stream starts as it is, the operators where their methods fit them. All rotations are orthogonal, so no
    error is made small by a change of its measure. Each step writes every operator out: seconds for widths of some
    hundred, not practical at 4096. The operators are not kept: fit them anew in the rewritten model.

    Args:
        methods: site name -> the method that will replace it; its operator must hold floats and be differentiable.
        batches: token ids.
        steps: of L-BFGS, at most.

    Returns:
        error_before and error_after, the root of the mean of the relative squared errors, and error_calls.

    Raises:
        ValueError: as `rotate_residual`; a name is no dense linear layer of the model or there is none; a method cannot
            be fitted. The gains of the norms may have moved into the layers then.
    """
    sites = _chosen(model, methods)
    stream = find_stream(model)
    rotate_residual(model, torch.eye(stream.width, dtype=torch.float64))  # the gains of the norms into the layers
    grams = _grams(model, sites, batches)
    layers = {attention.out.block: attention for attention in attentions(model)}
    for attention in layers.values():
        check_values(model, attention, orthogonal=True)
    heads = {
        block: torch.zeros(a.num_kv_heads, a.head_dim, a.head_dim, device=a.out.weight.device)
        for block, a in layers.items()
    }
    free = torch.zeros(stream.width, stream.width, device=stream.embeddings[0].weight.device)
    operators, terms = [], []
    for name, site in sites.items():
        operators.append(methods[name].fit(site.weight, {Gram: grams[name]}).float())
        terms.append(_term(site, operators[-1], grams[name].mean, layers.get(site.block), heads.get(site.block)))
    turn = _keeping_ones if stream.subtracts_mean else orthogonal
    learned = [free, *heads.values(), *(p for op in operators for p in op.parameters() if p.is_floating_point())]
    facts = _lower(learned, lambda: torch.stack([term(turn(free)) for term in terms]).mean(), steps, progress)
    rotate_residual(model, turn(free.double()))
    maps = {block: orthogonal(head.double()) for block, head in heads.items()}
    map_values(model, lambda attention: [(one, one.T) for one in maps[attention.out.block]], orthogonal=True)
    return facts


@torch.no_grad()
def reparameterise(
    model: Any, plan: Plan, batches: list[Tensor], *, steps: int, progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:  # (B, T) each
    """`learn_bases` for every linear layer for which the plan has such a method; one row about it.

    Raises:
        ValueError: as `learn_bases`, or the logits of the first batch changed.
    """
    sites = find_sites(model)
    chosen = plan.resolve(sites, len(blocks(model))).items()
    methods: Any = {name: method for name, method in chosen if method.is_differentiable}
    device = next(model.parameters()).device
    before = model(batches[0].to(device), use_cache=False).logits
    facts = learn_bases(model, methods, batches, steps=steps, progress=progress)
    after = model(batches[0].to(device), use_cache=False).logits
    check_equal(before, after)
    moved = float((after - before).double().abs().max() / before.double().std())
    return [{"kind": "bases", "sites": list(methods), **facts, "logits_moved": moved}]


def orthogonal(free: Tensor) -> Tensor:  # (..., D, D) -> (..., D, D)
    """A rotation for any square matrix; the identity for zero."""
    return torch.linalg.matrix_exp(free - free.mT)


def _keeping_ones(free: Tensor) -> Tensor:  # (D, D) -> (D, D)
    swap = ones_and_last(len(free)).to(free)
    inner = orthogonal(free[:-1, :-1])
    return swap @ torch.block_diag(inner, inner.new_ones(1, 1)) @ swap


def _chosen(model: nn.Module, methods: Mapping[str, LinearMethod]) -> dict[str, Site]:
    known = {site.name: site for site in find_sites(model) if site.kind == "linear"}
    if not methods or set(methods) - set(known):
        wrong = ", ".join(sorted(set(methods) - set(known))) or "nothing"
        raise ValueError(f"learn_bases is for dense linear layers of the model, and was asked for {wrong}")
    return {name: known[name] for name in methods}


def _grams(model: Any, sites: Mapping[str, Site], batches: Iterable[Tensor]) -> dict[str, Gram]:
    grams = {name: Gram(site.in_features, site.weight.device) for name, site in sites.items()}
    with ExitStack() as hooks:
        for name, site in sites.items():
            hooks.enter_context(_watching(site.module, grams[name]))
        for batch in batches_of(model, batches) or ():
            model(batch.to(next(iter(sites.values())).weight.device), use_cache=False)
    if not all(gram.num_tokens for gram in grams.values()):
        raise ValueError("learn_bases: there are no calibration batches: the iterable is empty")
    return grams


def _watching(module: nn.Module, gram: Gram) -> Any:
    return module.register_forward_pre_hook(lambda _, args: gram.update(args[0]))


def _term(
    site: Site, op: StructuredLinear, gram: Tensor, attention: Attention | None, head: Tensor | None
) -> Term:  # (I, I), (G, C, C)
    """W is compared with the operator between the rotations undone, so that W S is computed once."""
    root = gram_root(gram).float()  # (I, K)
    wanted = site.weight.float() @ root
    scale = float(wanted.square().sum())
    role = None if attention is None else {attention.names["v"]: "v", attention.names["o"]: "o"}.get(site.name)

    def error(stream: Tensor) -> Tensor:  # (D, D)
        dense = op.to_dense()
        if attention is not None and head is not None and role == "v":  # or q, k and v in one layer
            rows = attention.v.rows.to(dense.device)
            dense = dense.index_copy(0, rows, torch.block_diag(*orthogonal(head)).T @ dense[rows])
        elif attention is not None and head is not None and role == "o":
            dense = dense @ torch.block_diag(*attention.per_query_head(list(orthogonal(head))))
        dense = stream @ dense if site.role in WRITES else dense @ stream.T
        return (wanted - dense @ root).square().sum() / scale

    return error


def _lower(
    parameters: list[Tensor], error: Callable[[], Tensor], steps: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """In place; never higher than it was."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=0.0,
        tolerance_change=1e-9,
    )  # fmt: skip
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        progress(min(calls, steps), steps)
        optimiser.zero_grad()
        loss = error()
        loss.backward()
        return loss

    start, before = [parameter.detach().clone() for parameter in parameters], float(error().detach())
    with torch.enable_grad():
        optimiser.step(closure)
    after = float(error().detach())
    for parameter, value in zip(parameters, start, strict=True):
        parameter.requires_grad_(False)
        if not after <= before:  # also NaN
            parameter.copy_(value)
    return {"error_before": before**0.5, "error_after": min(before, after) ** 0.5, "error_calls": calls}
