"""One rotation of the whole residual stream, put into the weights that write it and into those that read it.

Shape letters: B sequences, T tokens, D hidden size, S directions of a basis, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormix.methods.slice_gpt import principal_basis
from tensormix.reparameterise.layers import set_values
from tensormix.sites import Site, is_dense, locate_blocks, role_of
from tensormix.sites.batches import batches_of
from tensormix.sites.families import FAMILIES, WRITES, eps_of, family_of, final_norm_of, has_norms_behind
from tensormix.sites.sliced import ends
from tensormix.sites.turning import check_turns
from tensormix.statistics import Gram

_ORTHOGONAL = 1e-5  # largest entry of R^T R - 1: what a rotation in fp32 is off


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream with the layers that read what it hands on; the last one has the head alone."""

    name: str
    module: Any
    readers: tuple[Site, ...]
    block: int | None

    @property
    def gain(self) -> Tensor | None:  # (D,)
        return self.module.weight

    @property
    def shift(self) -> Tensor | None:  # (D,)
        return getattr(self.module, "bias", None)

    def without_gain(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
        wide = hidden.double()
        if isinstance(self.module, nn.LayerNorm):
            return F.layer_norm(wide, wide.shape[-1:], eps=self.module.eps)
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps_of(self.module))


@dataclass(frozen=True)
class Stream:
    """Everything that touches the residual stream of a model."""

    embeddings: tuple[nn.Embedding, ...]  # of tokens, then of positions where these are learned
    norms: tuple[Norm, ...]
    writers: tuple[Site, ...]

    @property
    def width(self) -> int:
        return self.embeddings[0].embedding_dim

    @property
    def subtracts_mean(self) -> bool:
        return _subtract_mean(self.norms)


@torch.no_grad()
def rotate_residual(model: nn.Module, rotation: Tensor) -> list[str]:  # (D, D)
    """Let the residual stream be h R instead of h, in place; the model computes the same.

    The gain of every norm goes into the layers that read what it hands on, and so does the shift of a layer norm where
    all of them have biases; where not, it stays with the norm as shift / gain, turned. R then goes into the embeddings,
    all readers (q, k, v, gate, up, head) and all writers (o, down). Layer norms subtract the mean of the channels, so
    for them R must keep the vector of ones, up to its sign. Tied embeddings become two matrices: the readers' gain is
    in the head, and `config.tie_word_embeddings` is false from then on. Dropout of the stream, in training, then drops
    other channels.

    Returns:
        The names of the rewritten layers, norms aside.

    Raises:
        ValueError: the model is of another kind or no longer dense, R does not fit it or is not orthogonal, or a gain
            of zero hides a shift. Nothing was changed then.
    """
    stream = find_stream(model)
    basis = _checked(stream, rotation, type(model).__name__)
    names = {module: name for name, module in model.named_modules()}
    _check_shifts(stream)
    _untie(model)
    for embedding in stream.embeddings:
        embedding.weight.copy_(embedding.weight.double() @ basis)
    for norm in stream.norms:
        _read_through(norm, basis)
    for site in stream.writers:
        bias = None if site.bias is None else write(site.bias.double(), basis)
        set_values(site, write(site.weight.double(), basis), bias)
    readers = [site.name for norm in stream.norms for site in norm.readers]
    return [*(names[embedding] for embedding in stream.embeddings), *readers, *(site.name for site in stream.writers)]


@torch.no_grad()
def residual_basis(
    model: nn.Module, batches: Iterable[Tensor], blocks: Collection[int] | None = None
) -> Tensor:  # (B, T) each -> (D, D)
    """The rotation for `rotate_residual` after which the channels are sorted by energy, the strongest first.

    Its columns are the principal components of what the norms of `blocks` (all of them, without it) hand on before
    their gains, every norm with the same weight. For layer norms, whose outputs have no mean, the last coordinate of
    that basis would be the mean: a reflection between it and the vector of ones follows, which leaves the others as
    they are up to terms of 1/sqrt(D).

    Raises:
        ValueError: the model is of another kind, a block does not exist, there are no batches, or the stream is zero
            or not finite.
    """
    stream = find_stream(model)
    known = sorted({norm.block for norm in stream.norms if norm.block is not None})
    wanted = set(known if blocks is None else blocks)
    if not wanted or wanted - set(known):
        raise ValueError(f"residual_basis: blocks must be some of 0 to {known[-1]}, got {sorted(wanted)}")
    weight = stream.embeddings[0].weight
    gram = Gram(stream.width, weight.device)
    with ExitStack() as hooks:
        for norm in stream.norms:
            if norm.block in wanted:
                hooks.enter_context(_watching(norm, gram))
        for batch in batches_of(model, batches) or ():
            model(batch.to(weight.device), use_cache=False)
    if not gram.num_tokens:
        raise ValueError("residual_basis: there are no calibration batches: the iterable is empty")
    if not stream.subtracts_mean:
        return principal_basis(gram.mean, stream.width)
    swap = ones_and_last(stream.width).to(gram.mean)
    inner = principal_basis((swap @ gram.mean @ swap)[:-1, :-1], stream.width - 1)
    return swap @ torch.block_diag(inner, inner.new_ones(1, 1)) @ swap


def read(weight: Tensor, gain: Tensor, basis: Tensor) -> Tensor:  # (O, D), (D,), (D, S) -> (O, S)
    """The weight of a reader of h B that did the same to gain * h."""
    return weight.to(basis) * gain.to(basis) @ basis


def write(weight: Tensor, basis: Tensor) -> Tensor:  # (D, I) or (D,), (D, S) -> (S, I) or (S,)
    """The weight, or bias, of a writer of h B that wrote h."""
    return basis.T @ weight.to(basis)


def find_stream(model: nn.Module) -> Stream:
    """What touches the residual stream of a dense model that may be turned.

    Raises:
        ValueError: it is of another kind, or a part of it is no longer dense, or it is seen to do something else with
            its stream.
    """
    root, layers = locate_blocks(model)
    owner, (embedding, head) = model.get_submodule(root.rpartition(".")[0]), ends(model)
    norms: list[Norm] = []
    writers: list[Site] = []
    for index, block in enumerate(layers):
        _check_block(f"{root}.{index}", block)
        linear = _dense_layers(f"{root}.{index}", index, block)
        writers += [site for site in linear if site.role in WRITES]
        for name, starts in family_of(block).stream_norms.items():
            begins = tuple(f"{root}.{index}.{start}" for start in starts)
            readers = tuple(s for s in linear if s.role not in WRITES and s.name.startswith(begins))
            norms.append(Norm(f"{root}.{index}.{name}", block.get_submodule(name), readers, index))
    last = final_norm_of(model, root)
    if last is None or not (isinstance(embedding, nn.Embedding) and type(head) is nn.Linear):
        raise ValueError(
            f"{type(model).__name__}: turning the residual stream needs an embedding of its width, a final norm and a "
            "linear head that reads it"
        )
    names = {module: name for name, module in model.named_modules()}
    of_head = Site(names[head], "linear", None, None, head)
    norms.append(Norm(last, model.get_submodule(last), (of_head,), None))
    check_turns(model, _by_block(norms), _by_block(writers), last, keeps_mean=_subtract_mean(norms))
    positions = [module for module in owner.children() if isinstance(module, nn.Embedding) and module is not embedding]
    return Stream((embedding, *positions), tuple(norms), tuple(writers))


def _subtract_mean(norms: Iterable[Norm]) -> bool:
    return any(isinstance(norm.module, nn.LayerNorm) for norm in norms)


def _by_block(parts: Iterable[Norm] | Iterable[Site]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for part in parts:
        if part.block is not None:
            found.setdefault(part.block, []).append(part.name)
    return found


def _check_block(name: str, block: nn.Module) -> None:
    kind, norms = type(block).__name__, family_of(block).stream_norms
    if not norms or has_norms_behind(block):
        after = " with norms behind attention and MLP" if norms else ""
        known = ", ".join(name for name, family in FAMILIES.items() if family.stream_norms)
        raise ValueError(
            f"{name} is a {kind}{after}: the residual stream can be turned where dense blocks read it through norms "
            f"before attention and MLP and only add to it ({known}); other models change if it is turned"
        )


def _dense_layers(prefix: str, index: int, block: nn.Module) -> list[Site]:
    found = []
    for name, module in block.named_modules(prefix=prefix):
        role = role_of(name)
        if role is not None and not is_dense(module):
            raise ValueError(f"{name} is a {type(module).__name__} already; the residual stream of a dense model turns")
        if role is not None:
            found.append(Site(name, "linear", role, index, module))
    return found


def _checked(stream: Stream, rotation: Tensor, model: str) -> Tensor:  # (D, D) -> (D, D)
    D = stream.width
    if tuple(rotation.shape) != (D, D):
        raise ValueError(f"rotation must be {D}x{D} for this residual stream, got {'x'.join(map(str, rotation.shape))}")
    basis = rotation.to(stream.embeddings[0].weight.device, torch.float64)
    off = float((basis.T @ basis - torch.eye(D).to(basis)).abs().max())
    if not off <= _ORTHOGONAL:
        raise ValueError(f"rotation must be orthogonal: R^T R is off by {off:.2g}, allowed is {_ORTHOGONAL}")
    kept = basis.sum(0)  # (D,), of ones
    if stream.subtracts_mean and float((kept * kept[0].sign() - 1).abs().max()) > _ORTHOGONAL * D**0.5:
        raise ValueError(
            f"rotation must keep the vector of ones: the layer norms of {model} subtract the mean of the channels; "
            "residual_basis gives one that does"
        )
    return basis


def _check_shifts(stream: Stream) -> None:
    for norm in stream.norms:
        if norm.shift is not None and norm.gain is not None and not _has_biases(norm):
            hidden = (norm.gain == 0) & (norm.shift != 0)
            if bool(hidden.any()):
                raise ValueError(
                    f"{norm.name}: its gain is zero and its shift is not at {int(hidden.sum())} channels, and "
                    f"{norm.readers[0].name} has no bias to take the shift; nothing was changed"
                )


def _has_biases(norm: Norm) -> bool:
    return all(site.bias is not None for site in norm.readers)


def _read_through(norm: Norm, basis: Tensor) -> None:  # (D, D)
    """Gain and rotation into the readers, which leaves the norm without them."""
    gain = basis.new_ones(len(basis)) if norm.gain is None else norm.gain.double()
    shift = basis.new_zeros(len(basis)) if norm.shift is None else norm.shift.double()
    biased = _has_biases(norm)
    for site in norm.readers:
        bias = site.bias.double() + site.weight.double() @ shift if biased and site.bias is not None else None
        set_values(site, read(site.weight, gain, basis), bias)
    if norm.shift is not None:
        left = torch.where(shift == 0, 0, shift / gain) @ basis
        norm.shift.copy_(torch.zeros_like(left) if biased else left)
    if norm.gain is not None:
        norm.gain.fill_(1)


def _untie(model: Any) -> None:
    embedding, head = ends(model)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _watching(norm: Norm, gram: Gram) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        gram.update(norm.without_gain(args[0]))

    return norm.module.register_forward_pre_hook(hook)


def ones_and_last(width: int) -> Tensor:  # (D, D)
    """The reflection that swaps the direction of the vector of ones and the last axis."""
    between = torch.full((width,), width**-0.5, dtype=torch.float64)
    between[-1] -= 1
    between = between / between.norm() if width > 1 else between * 0
    return torch.eye(width, dtype=torch.float64) - 2 * torch.outer(between, between)
