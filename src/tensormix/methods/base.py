"""What every method is: a frozen description of how an operator is fitted to one weight.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tensormix.operators import StructuredLinear

Statistics = Mapping[type, Any]  # statistic class -> what it saw at this site


class Method(BaseModel):
    """The fields are the whole configuration; unknown keys are refused. A method sees tensors, never models."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    site: ClassVar[Literal["linear", "joint", "block", "model"]]
    source: ClassVar[str]  # paper, or "ours"
    summary: ClassVar[str]  # one sentence
    needs: ClassVar[tuple[type, ...]] = ()  # statistics classes

    name: str  # a Literal in every method: it tells the methods of a plan apart


class LinearMethod(Method):
    """Replaces the weight of one linear layer.

    A method whose operator can be larger or smaller names the setting that says so; a budget then decides it, site by
    site, and whoever writes the recipe leaves it out.
    """

    site = "linear"
    size: ClassVar[str | None] = None  # the setting that a budget decides
    largest: ClassVar[Any] = None  # the value of that setting that stands for "not decided yet"

    def allowed_sizes(self, in_features: int, out_features: int) -> Sequence[Any]:
        """Every value of `size` that a layer of these sizes allows; none if there is nothing to decide."""
        return ()

    def sized(self, value: Any) -> Self:
        """The same method at another size."""
        return self.model_copy(update={str(self.size): value})

    def setting_of(self, value: Any) -> str:
        """The name of what `sized` sets to this value."""
        return str(self.size)

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


class BlockMethod(Method):
    """Replaces a whole block."""

    site = "block"

    @property
    def num_chosen(self) -> int | None:
        """How many blocks of its rule it takes, chosen by measuring the dense model; None: every one of them."""
        return None

    def named(self, chosen: list[int]) -> list[tuple[list[int], BlockMethod]]:
        """What becomes of the blocks that were chosen: methods that take every block of theirs."""
        return [(chosen, self)]

    def empty(self, block: nn.Module, hidden_size: int, *, returns: str = "tensor") -> nn.Module:
        """What `replace` would give, on meta: for checking sizes and costs."""
        return self.replace(block, returns=returns)

    @abstractmethod
    def replace(self, block: nn.Module, *, returns: str = "tensor") -> nn.Module:
        """What stands in for `block`: a StandIn, or a block of the same kind.

        `returns` says whether the model's blocks return a "tensor" or a "tuple".
        """


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
    layer keeps its shape.
    """

    site = "joint"
    roles: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o", "gate", "up", "down")  # those that it can change
    size: ClassVar[str | None] = None  # as of a `LinearMethod`, for all layers together: a fraction from 0 to 1
    largest: ClassVar[Any] = 1.0

    def needs_at(self, role: str) -> tuple[type, ...]:
        """The statistics that it needs of the inputs of this role; those of q, k, v are the same, and of gate, up."""
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
    """Changes a whole model at once, and so is the only rule of its plan."""

    site = "model"
