"""What every method is: a frozen description of how an operator is fitted to one weight.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tensormix.operators import StackedLinear, StructuredLinear
from tensormix.statistics import Gram

# Pairs of a site and a size, and the function that scores some of them -> the chosen ones, and all trials.
Search = Callable[[Sequence[tuple[str, Any]], Callable[[Mapping[str, Any]], tuple[float, float]]], Any]
Statistics = Mapping[type, Any]  # statistic class -> what it saw at this site


class Method(BaseModel):
    """The fields are the whole configuration; unknown keys are refused. A method sees tensors, never models.

    `takes` says what is fitted together: one matrix (of a stack of experts each for itself), a stack, layers of one
    block or of several by their roles, a block, several consecutive blocks, or the whole model; of a choice among
    methods nothing is. The other class attributes say what a method offers beside its fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    takes: ClassVar[Literal["matrix", "stack", "layers", "block", "span", "model", "choice"]]
    source: ClassVar[str]  # paper, or "ours"
    summary: ClassVar[str]  # one sentence
    needs: ClassVar[tuple[type, ...]] = ()  # statistics classes
    roles: ClassVar[tuple[str, ...]] = ()  # the layers that it knows; none: it asks for no role
    size: ClassVar[str | None] = None  # the setting that a budget decides; who writes the recipe leaves it out
    largest: ClassVar[Any] = None  # the value of that setting that stands for "not decided yet"
    search: ClassVar[Search | None] = None  # chooses sites and sizes by trying them

    name: str  # a Literal in every method: it tells the methods of a plan apart

    @property
    def num_chosen(self) -> int | None:
        """How many blocks of its rule it takes, chosen by measuring the dense model; None: every one of them.

        A method that chooses says how: `choose` "angular" (consecutive blocks, by the angle of the `tokens`, "all" or
        "last") or "influence" (single blocks).
        """
        return None

    def named(self, chosen: list[int]) -> list[tuple[list[int], Method]]:
        """What becomes of the blocks that were chosen: methods that take every block of theirs."""
        return [(chosen, self)]

    @property
    def num_blocks(self) -> int | None:
        """How many neighbouring blocks layers are taken of, or a span has; None: every run of blocks of its rule."""
        return 1

    @property
    def is_differentiable(self) -> bool:
        """Whether it fits operators of floats to linear layers from a Gram matrix at most: then bases can be learned
        in which it loses least."""
        return False

    @property
    def learned_storage(self) -> str | None:
        """How the factors are stored whose ranks can be learned for a whole model; None if they cannot."""
        return None

    def allowed_sizes(self, in_features: int, out_features: int) -> Sequence[Any]:
        """Every value of `size` that a layer of these sizes allows; none if there is nothing to decide."""
        return ()

    def sized(self, value: Any) -> Self:
        """The same method at another size."""
        return self.model_copy(update={str(self.size): value})

    def setting_of(self, value: Any) -> str:
        """The name of what `sized` sets to this value."""
        return str(self.size)


class LinearMethod(Method):
    """Replaces the weight of one linear layer, or of every expert of a stack, each for itself."""

    takes = "matrix"

    @property
    def is_differentiable(self) -> bool:
        return set(self.needs) <= {Gram}

    @property
    def has_spectrum(self) -> bool:
        return type(self).spectrum is not LinearMethod.spectrum

    def spectrum(self, weight: Tensor, stats: Statistics) -> Tensor | None:  # (O, I) -> (K,)
        """The singular values, from the largest on, of which the squares beyond rank R sum to the squared error of the
        fit of rank R. None if the error of this method has no such form."""
        return None

    @abstractmethod
    def empty(self, in_features: int, out_features: int) -> StructuredLinear:
        """The operator that `fit` would give for a layer of these sizes, on meta: for checking sizes and costs.

        Raises:
            ValueError: the layer does not allow the sizes that are asked for.
        """

    @abstractmethod
    def fit(self, weight: Tensor, stats: Statistics) -> StructuredLinear:  # (O, I)
        """The fitted operator, in the dtype and on the device of `weight`.

        A bias set on it is meant to be added to the bias of the site.
        """

    def fit_with_facts(self, weight: Tensor, stats: Statistics) -> tuple[StructuredLinear, dict[str, Any]]:  # (O, I)
        """`fit`, and what a row should say about how it went: JSON-able, nothing by default."""
        return self.fit(weight, stats), {}


class StackMethod(Method):
    """Replaces the weights of all experts of a stack together."""

    takes = "stack"

    @abstractmethod
    def empty(self, num_experts: int, in_features: int, out_features: int) -> StackedLinear:
        """The operator that `fit` would give for stacks of these sizes, on meta.

        Raises:
            ValueError: the stack does not allow the sizes that are asked for.
        """

    @abstractmethod
    def fit(self, weight: Tensor, stats: Sequence[Statistics]) -> StackedLinear:  # (E, O, I)
        """The fitted operator, in the dtype and on the device of `weight`; `stats` has those of each expert."""


class BlockMethod(Method):
    """Replaces a whole block."""

    takes = "block"

    def empty(self, block: nn.Module, hidden_size: int, *, returns: str = "tensor") -> nn.Module:
        """What `replace` would give, on meta: for checking sizes and costs."""
        return self.replace(block, returns=returns)

    @abstractmethod
    def replace(self, block: nn.Module, *, returns: str = "tensor") -> nn.Module:
        """What stands in for `block`: a StandIn, or a block of the same kind.

        `returns` says whether the model's blocks return a "tensor" or a "tuple".
        """


Run = Callable[[nn.Module, Tensor], Tensor]  # a block on one batch of hidden states (B, T, D), as the model calls it


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """What several blocks did in the dense model, batch by batch: a statistic of a `SpanMethod`."""

    stream: ClassVar[str] = "dense"

    runs: Sequence[Run]  # how the model calls the first of them
    entering: Sequence[Tensor]  # (B, T, D) each
    leaving: Sequence[Tensor]  # (B, T, D) each


class SpanMethod(Method):
    """Replaces several consecutive blocks together."""

    takes = "span"
    needs = (HiddenStates,)

    @property
    def num_blocks(self) -> int | None:
        return None

    @abstractmethod
    def empty(self, blocks: Sequence[nn.Module], hidden_size: int, *, returns: str = "tensor") -> list[nn.Module]:
        """What `fit` would give, on meta: for checking sizes and costs."""

    @abstractmethod
    def fit(
        self, blocks: Sequence[nn.Module], states: HiddenStates, *, returns: str = "tensor"
    ) -> tuple[list[nn.Module], dict[str, Any]]:
        """What stands in for each of the dense blocks, and what the row of the first of them says: JSON-able.

        `returns` says whether the model's blocks return a "tensor" or a "tuple".
        """


Symmetry = Literal["turned values", "mapped values", "neurons"]


class Heads(NamedTuple):
    """How the outputs of q (num_heads of them), k and v (num_kv_heads) and the inputs of o are divided."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear layer of several that are changed together."""

    weight: Tensor  # (O, I)
    bias: Tensor | None = None  # (O,)


class RoleError(ValueError):
    """Something is wrong with one of the layers: its role, and why."""

    def __init__(self, role: str, reason: str) -> None:
        super().__init__(f"{role}: {reason}")
        self.role, self.reason = role, reason


@contextmanager
def about(role: str) -> Iterator[None]:
    """A ValueError raised inside becomes a `RoleError` about this role."""
    try:
        yield
    except ValueError as reason:
        raise RoleError(role, str(reason)) from None


class JointMethod(Method):
    """Replaces linear layers of one block together, so that what one puts out may change if another takes it in so.

    The layers come by role; a fused one (qkv, gate_up) comes as its parts. The block's function must stay what it is:
    neurons may be put in another order or removed, channels of heads turned, as long as the readers are too. Every
    layer keeps its shape. Of a method of several neighbouring blocks the layers come as "0.q", "1.q" and so on.

    A `size` is one for all layers together: a fraction from 0 to 1.
    """

    takes = "layers"
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    roles_of_heads: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o")  # that must be divided as `Heads` says
    largest: ClassVar[Any] = 1.0

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        """What it relies on: that values may be turned between v and o, or mapped in any invertible way, and that
        neurons may be put in another order between gate, up and down. It is asked only where that is so."""
        return ("turned values", "neurons")

    def needs_at(self, role: str) -> tuple[type, ...]:
        """The statistics that it needs of the inputs of this role; those of q, k, v of a block are the same, and of
        gate, up."""
        return self.needs

    @abstractmethod
    def empty(self, shapes: Mapping[str, tuple[int, int]], heads: Heads | None) -> dict[str, StructuredLinear]:
        """The operators that `fit` would give for layers of these shapes (O, I), on meta.

        Raises:
            ValueError: roles are missing that belong together, or a layer does not allow what is asked for.
        """

    @abstractmethod
    def fit(
        self, layers: Mapping[str, Layer], stats: Mapping[str, Statistics], heads: Heads | None
    ) -> dict[str, StructuredLinear]:
        """The fitted operators, in the dtypes and on the devices of the weights.

        The bias of an operator is the final one of the layer. Raises `RoleError` if a layer cannot be fitted.
        """


class ModelMethod(Method):
    """Projects the residual stream of a whole model onto fewer channels, and so is the only rule of its plan."""

    takes = "model"

    @abstractmethod
    def width(self, full: int) -> int:
        """S for a hidden size D. Raises ValueError if nothing would be left."""

    @abstractmethod
    def basis(self, stats: Statistics, width: int) -> Tensor:  # (D, S)
        """The orthonormal channels that stay at one place, from the statistics of the stream there.

        Raises ValueError if there are none to be found.
        """
