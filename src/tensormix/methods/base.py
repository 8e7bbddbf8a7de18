"""What every method is: a frozen description of how an operator is fitted to one weight.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tensormix.operators import Bypass, StructuredLinear

Statistics = Mapping[type, Any]  # statistic class -> what it saw at this site


class Method(BaseModel):
    """The fields are the whole configuration; unknown keys are refused. A method sees tensors, never models."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    site: ClassVar[Literal["linear", "block"]]
    source: ClassVar[str]  # paper, or "ours"
    summary: ClassVar[str]  # one sentence
    needs: ClassVar[tuple[type, ...]] = ()  # statistics classes

    name: str  # a Literal in every method: it tells the methods of a plan apart


class LinearMethod(Method):
    """Replaces the weight of one linear layer."""

    site = "linear"

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


class BlockMethod(Method):
    """Replaces a whole block."""

    site = "block"

    @property
    def num_chosen(self) -> int | None:
        """How many blocks of its rule it takes, chosen by measuring the dense model; None: every one of them."""
        return None

    @abstractmethod
    def replace(self, block: nn.Module, *, returns: str = "tensor") -> Bypass:
        """What stands in for `block`; `returns` says whether the model's blocks return a "tensor" or a "tuple"."""
