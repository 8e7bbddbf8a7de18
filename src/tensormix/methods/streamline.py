"""Several consecutive blocks replaced by one layer that is fitted to what they did.

Shape letters: B sequences, T tokens, D hidden size, M hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import cos, pi
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tensormix.fitting.block_distances import BlockDistances
from tensormix.fitting.whitening import gram_root, output_basis
from tensormix.methods.base import HiddenStates, Method, Run, SpanMethod
from tensormix.methods.drop_blocks import DropBlocks
from tensormix.operators import ResidualMLP


class _Needs:
    """Before the blocks are chosen their distances; then what enters and leaves them."""

    def __get__(self, method: Streamline | None, owner: type) -> tuple[type, ...]:
        return (BlockDistances,) if method is None or method.count is not None else (HiddenStates,)


class Streamline(SpanMethod):
    """The `count` consecutive blocks that turn the hidden states least are left out, and one replacement is put there.

    "layer" is a copy of the first of them, trained; it stays a block of the architecture. "mlp" is a ResidualMLP of
    `width` units that begins as the linear map of rank width / 2 with the smallest error (a closed form; the optimum
    where the blocks are linear), and is trained from there. Both minimise the mean squared error to the hidden states
    that left the blocks in the dense model, from those that entered them, and of all steps the best is taken.
    """

    source = "LLM-Streamline, arXiv 2403.19135"
    summary = "Consecutive blocks are left out, and one layer is fitted to what they did to the hidden states."
    needs: ClassVar[Any] = _Needs()
    choose: ClassVar[str] = "angular"
    tokens: ClassVar[str] = "all"

    name: Literal["streamline"] = "streamline"
    count: int | None = Field(ge=1)  # blocks that are replaced, of those that the rule is about; null: all of them
    replacement: Literal["layer", "mlp"] = "layer"
    width: int | None = Field(default=None, ge=2, multiple_of=2)  # hidden units of the mlp
    steps: int = Field(default=200, ge=0)  # of Adam, each on one calibration batch
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)  # falls to 0 with a cosine
    seed: int = Field(default=0, ge=0)  # of the order of the batches

    @model_validator(mode="after")
    def _width_of_mlp(self) -> Self:
        if (self.replacement == "mlp") != (self.width is not None):
            raise ValueError("Streamline: width is the number of hidden units of replacement 'mlp'; give both or none")
        return self

    @property
    def num_chosen(self) -> int | None:
        return self.count

    def named(self, chosen: list[int]) -> list[tuple[list[int], Method]]:
        return [(chosen, self.model_copy(update={"count": None}))]

    def empty(self, blocks: Sequence[nn.Module], hidden_size: int, *, returns: str = "tensor") -> list[nn.Module]:
        first = blocks[0] if self.replacement == "layer" else self._mlp(blocks[0], hidden_size, returns)
        return [first, *_left_out(blocks[1:], returns)]

    def fit(
        self, blocks: Sequence[nn.Module], states: HiddenStates, *, returns: str = "tensor"
    ) -> tuple[list[nn.Module], dict[str, Any]]:
        """Facts are the mean squared error per number "mse", and that of leaving all blocks out, "mse_dropped".

        Raises:
            ValueError: a hidden state, or the error, is not finite.
        """
        block, (runs, entering, leaving) = blocks[0], (states.runs, states.entering, states.leaving)
        if not all(bool(state.isfinite().all()) for state in (*entering, *leaving)):
            raise ValueError("Streamline: hidden states hold NaN or infinite values; nothing was changed")
        if self.replacement == "layer":
            module = copy.deepcopy(block).float()
        else:
            module = self._mlp(block, entering[0].shape[-1], returns, entering[0].device)
            _fill_linear(module, entering, leaving)
        module.eval()
        dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), entering[0].dtype)
        best = _train(module, runs, entering, leaving, self)
        fitted = module.to(dtype)
        fitted.load_state_dict(best)
        for parameter, like in zip(fitted.parameters(), block.parameters(), strict=False):
            parameter.requires_grad_(like.requires_grad)
        wide = _error(lambda run, state: run(fitted, state), runs, entering, leaving)
        facts = {"mse": wide, "mse_dropped": _error(lambda run, state: state, runs, entering, leaving)}
        return [fitted, *_left_out(blocks[1:], returns)], facts

    def _mlp(self, block: nn.Module, hidden_size: int, returns: str, device: Any = "meta") -> ResidualMLP:
        assert self.width is not None
        bypass = DropBlocks().replace(block, returns=returns)
        with torch.device(device):
            return ResidualMLP(hidden_size, self.width, **bypass.sizes)


def _left_out(blocks: Sequence[nn.Module], returns: str) -> list[nn.Module]:
    return [DropBlocks().replace(block, returns=returns) for block in blocks]


def _fill_linear(mlp: ResidualMLP, entering: Sequence[Tensor], leaving: Sequence[Tensor]) -> None:  # (B, T, D) each
    """The linear map of rank M / 2 with the smallest error, in pairs of units of which one sees the negative input.

    The least squares map is A = C G^+, G = sum h h^T, C = sum (h' - h) h^T. What it leaves is orthogonal to all h, so
    the best of lower rank is the best approximation of A on the same h.
    """
    size = entering[0].shape[-1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=entering[0].device)
    cross = torch.zeros_like(gram)
    for before, after in zip(entering, leaving, strict=True):
        h, change = (state.double().reshape(-1, size) for state in (before, after.double() - before.double()))
        gram += h.T @ h
        cross += change.T @ h
    root = gram_root(gram)  # (D, K), columns orthogonal
    linear = cross @ (root / root.square().sum(0).square()) @ root.T  # G^+ = V L^-1 V^T, root = V L^1/2
    rank = min(mlp.width // 2, size)
    basis = output_basis(linear, root, rank)
    right = basis.T @ linear
    scale = (right.norm(dim=1) / basis.norm(dim=0)).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    right, left = right / scale[:, None], basis * scale
    with torch.no_grad():
        mlp.up.zero_()
        mlp.down.zero_()
        mlp.up[: 2 * rank] = torch.cat([right, -right]).to(mlp.up)
        mlp.down[:, : 2 * rank] = torch.cat([left, -left], dim=1).to(mlp.down)


def _train(
    module: nn.Module, runs: Sequence[Run], entering: Sequence[Tensor], leaving: Sequence[Tensor], settings: Streamline
) -> dict[str, Tensor]:
    """The state of `module` with the smallest error over all batches, looked at ten times, at the start and the end."""
    order, queue = torch.Generator().manual_seed(settings.seed), []
    parameters = [p.requires_grad_() for p in module.parameters() if p.is_floating_point()]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    lowest, best = float("inf"), copy.deepcopy(module.state_dict())
    for step in range(settings.steps + 1):
        if step % max(1, settings.steps // 10) == 0 or step == settings.steps:
            error = _error(lambda run, state: run(module, state.float()), runs, entering, leaving)
            if error < lowest:
                lowest, best = error, copy.deepcopy(module.state_dict())
        if step == settings.steps:
            break
        queue = queue or torch.randperm(len(runs), generator=order).tolist()
        batch = queue.pop()
        optimizer.zero_grad(set_to_none=True)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 + cos(pi * step / settings.steps)) / 2
        with torch.enable_grad():
            got, wanted = runs[batch](module, entering[batch].float()), leaving[batch].float()
            ((got - wanted).square().mean() / wanted.square().mean()).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if lowest == float("inf"):
        raise ValueError("Streamline: the replacement gives NaN or infinite hidden states; nothing was changed")
    return best


@torch.no_grad()
def _error(
    apply: Callable[[Run, Tensor], Tensor], runs: Sequence[Run], entering: Sequence[Tensor], leaving: Sequence[Tensor]
) -> float:
    """Mean squared error per number over all batches."""
    pairs = zip(runs, entering, leaving, strict=True)
    total = sum(float((apply(run, before).double() - after.double()).square().sum()) for run, before, after in pairs)
    return total / sum(state.numel() for state in leaving)
