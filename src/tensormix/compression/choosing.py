"""Which blocks a plan means where it leaves that to measuring: the hidden states of the dense model, before the walk.

Shape letters: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tensormix.compression.kinds import planned_units
from tensormix.fitting.block_distances import BlockDistances
from tensormix.plan import Plan, Rule
from tensormix.sites import blocks, find_sites, locate_blocks
from tensormix.sites.through import Blocks, Keep, through

Notes = dict[str, dict[str, Any]]  # name of a block -> what its row says about how it was chosen


class Kind(NamedTuple):
    """One kind of window: so many consecutive blocks, and which tokens count."""

    size: int
    tokens: str


Measured = dict[Kind, list[BlockDistances]]  # of the window that begins at block 0, 1, 2, ...


def chooses(plan: Plan) -> bool:
    """Whether some rule leaves its blocks to measuring."""
    return any(rule.method.num_chosen is not None for rule in plan.root)


@torch.no_grad()
def settle(
    model: nn.Module, plan: Plan, source: Blocks, batches: Iterable[Tensor] | None, keep: Keep
) -> tuple[Plan, Notes]:
    """The same plan with its blocks named, and what the measuring found.

    Args:
        model: dense where the plan is to be applied, in evaluation mode.
        batches: token ids (B, T).
        keep: as `Activations.keep`.

    Raises:
        ValueError: there are no batches, a rule asks for more blocks than are left to it, or a hidden state has no
            direction (NaN, infinite, zero).
    """
    choosing: list[Any] = [rule.method for rule in plan.root if rule.method.num_chosen is not None]
    if batches is None:
        names = ", ".join(kind.__name__ for kind in choosing[0].needs)
        raise ValueError(f"{choosing[0].name} needs calibration batches ({names}), but none were given")
    measured = measure(model, source, batches, {_kind(method) for method in choosing}, keep)
    names = locate_blocks(model)[0]

    def pick(method: Any, candidates: list[list[int]]) -> tuple[list[int], Notes]:
        found = measured[_kind(method)]
        value = {start: found[start].angle if method.choose == "angular" else found[start].influence
                 for start in (window[0] for window in candidates)}  # fmt: skip
        if method.choose == "angular":
            best = min(candidates, key=lambda window: value[window[0]])
            said = [{"chosen_by": "angular", "window": [best[0], best[-1]], "angle": value[best[0]]}] * len(best)
        else:
            best = sorted(sorted(value, key=lambda start: value[start])[: method.num_chosen])
            said = [{"chosen_by": "influence", "influence": value[index]} for index in best]
        notes = {f"{names}.{index}": dict(row) for index, row in zip(best, said, strict=True)}
        notes[f"{names}.{best[0]}"]["candidates"] = {str(start): number for start, number in value.items()}
        return best, notes

    return _narrowed(model, plan, pick)


def assume(model: nn.Module, plan: Plan) -> Plan:
    """The same plan with the last blocks that a rule could choose, for counting what it costs without measuring.

    Raises ValueError as `settle` does if there are not enough.
    """

    def last(method: Any, candidates: list[list[int]]) -> tuple[list[int], Notes]:
        is_window = method.choose == "angular"
        return (candidates[-1] if is_window else [c[0] for c in candidates[-method.num_chosen :]]), {}

    return _narrowed(model, plan, last)[0]


# Of a method and its candidates, which are windows or single blocks: those to take, and what their rows say.
Pick = Callable[[Any, list[list[int]]], tuple[list[int], Notes]]


def _narrowed(model: nn.Module, plan: Plan, pick: Pick) -> tuple[Plan, Notes]:
    """Every choosing rule with the blocks that `pick` takes of its candidates."""
    sites, num_blocks, rules, notes = find_sites(model), len(blocks(model)), list[Rule](), Notes()
    for number, rule in enumerate(plan.root):
        if rule.method.num_chosen is None:
            rules.append(rule)
            continue
        claimed = Plan(tuple(rules)).resolve(sites, num_blocks)
        taken = {site.block for site in sites if site.name in claimed}
        there = {site.block for site in sites if site.kind == "block"}
        free = sorted(rule.block_indices(num_blocks) & there - taken)
        method: Any = rule.method
        size, count = _kind(method).size, method.num_chosen
        candidates = [[*range(i, i + size)] for i in free if {*range(i, i + size)} <= {*free}]
        if len(candidates) < (1 if method.choose == "angular" else count):
            wanted = "consecutive ones of the" if method.choose == "angular" else "of the"
            most = _longest_run(free) if method.choose == "angular" else len(free)
            raise ValueError(
                f"plan[{number}] ({rule}): {method.name} asks for {count} {wanted} {len(free)} blocks that are left "
                f"to it; the largest possible count is {most}"
            )
        named, noted = _spared(model, rules, method, candidates, pick)
        rules += named
        notes.update(noted)
    return Plan(tuple(rules)), notes


def _spared(
    model: nn.Module, before: Sequence[Rule], method: Any, candidates: list[list[int]], pick: Pick
) -> tuple[list[Rule], Notes]:
    """Rules for what `pick` takes of the candidates that the model can do without, after the rules `before`.

    Raises ValueError, naming one that it needs, if too few are left.
    """
    is_window = method.choose == "angular"

    def rules_of(indices: list[int]) -> list[Rule]:
        return [Rule(blocks=",".join(map(str, part)), method=named) for part, named in method.named(indices)]

    def refusal(indices: list[int]) -> ValueError | None:
        try:
            planned_units(model, Plan((*before, *rules_of(indices))))
        except ValueError as error:
            return error
        return None

    while True:
        chosen, notes = pick(method, candidates)
        error = refusal(chosen)
        if error is None:
            return rules_of(chosen), notes
        needed = [chosen] if is_window else [[index] for index in chosen if refusal([index]) is not None]
        candidates = [candidate for candidate in candidates if candidate not in needed]
        if not needed or len(candidates) < (1 if is_window else method.num_chosen):
            raise error


def measure(model: nn.Module, source: Blocks, batches: Iterable[Tensor], kinds: set[Kind], keep: Keep) -> Measured:
    """One pass of the dense model over `batches`; of the hidden states between blocks, the last few are kept.

    Raises ValueError if there are no batches, or, naming the blocks, if a hidden state has no direction.
    """
    root = locate_blocks(model)[0]
    found: Measured = {kind: [] for kind in sorted(kinds)}
    entered: deque[list[Tensor]] = deque(maxlen=max(kind.size for kind in kinds))  # what entered the last blocks
    for part in through(model, source, batches, keep):
        entered.append(list(part.hidden["dense"]))
        hidden, index = part.pass_on("dense"), part.span[0]
        for kind in (kind for kind in found if kind.size <= len(entered)):
            distances = BlockDistances(kind.tokens)
            start = index + 1 - kind.size
            try:
                for before, after in zip(entered[-kind.size], hidden, strict=True):
                    distances.update(before, after)
            except ValueError as error:
                raise ValueError(f"{root}.{start} to {root}.{index}: {error}") from None
            found[kind].append(distances)
    return found


def _kind(method: Any) -> Kind:
    return Kind(method.num_chosen, method.tokens) if method.choose == "angular" else Kind(1, "all")


def _longest_run(indices: list[int]) -> int:
    longest = run = 0
    for place, index in enumerate(indices):
        run = run + 1 if place and indices[place - 1] == index - 1 else 1
        longest = max(longest, run)
    return longest
