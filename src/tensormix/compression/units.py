"""What is fitted together: the sites that one method changes at once, and how it is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tensormix.methods import Method
from tensormix.operators import Cost, Owner, View
from tensormix.rows import Row
from tensormix.sites import Site, cost_of
from tensormix.statistics import is_finite

# site name -> of each expert: statistic class -> what it saw. Any: no dictionary says that a value is of the class
# that is its key.
Statistics = dict[str, list[dict[type, Any]]]


class Fitted(NamedTuple):
    """What a unit came to.

    Attributes:
        operators: by the name of the module whose place each takes. What several of them share has views at their
            sites; it may be there too, under a name of its own.
        facts: site name -> what the row about it says beside sizes and costs.
    """

    operators: Mapping[str, nn.Module]
    facts: dict[str, Row]


class Unit(ABC):
    """The sites that one method changes together, in the order of the model: nothing else calls a method.

    `first_block` and `last_block` say from where to where it reaches; all of that is in memory while it is fitted.
    """

    moves_bias: ClassVar[bool] = True  # the biases of the sites go to the operators, which have none or add theirs
    has_spectrum: bool = False  # `spectra` gives singular values
    error_left_out: ClassVar[float] = 0.0  # relative, where nothing is fitted and measured

    def __init__(self, model: nn.Module, method: Method, sites: Iterable[Site]) -> None:
        self.model, self.method, self.sites = model, method, tuple(sites)
        self.kinds: tuple[type, ...] = method.needs  # of statistics; a survey looks at others than the fit

    @property
    def name(self) -> str:
        """Of the first site."""
        return self.sites[0].name

    @property
    def first_block(self) -> int:
        return min(site.block or 0 for site in self.sites)

    @property
    def last_block(self) -> int:
        return max(site.block or 0 for site in self.sites)

    @property
    def blocks(self) -> range:
        return range(self.first_block, self.last_block + 1)

    def needs(self) -> dict[str, tuple[type, ...]]:
        """Site name -> the statistics of its inputs."""
        return {self.name: self.kinds} if self.kinds else {}

    @abstractmethod
    def empty(self) -> Mapping[str, nn.Module]:
        """`Fitted.operators` on meta, in the dtypes of the weights, without a fit.

        Raises ValueError, naming the site, if the method cannot work there.
        """

    @abstractmethod
    def fit(self, stats: Statistics, tidy: Callable[[], None] = lambda: None) -> Fitted:
        """The operators, in the dtypes and on the devices of the weights; `stats` is by site name, as `needs` is.

        `tidy` is called when something large is no longer needed. Raises ValueError, naming the site, if something
        cannot be fitted or is not finite.
        """

    @contextmanager
    def named(self) -> Generator[None]:
        """A ValueError raised inside names the site."""
        try:
            yield
        except ValueError as reason:
            raise ValueError(f"{self.name}: {reason}") from None

    def check_sizes(self) -> None:
        """Raise ValueError, naming the site, if the method cannot work there, whatever the numbers are."""
        self.empty()

    def alternatives(self) -> list[tuple[object, Unit]]:
        """The same sites at every size that the method has, by size; of a method without sizes as "whole"."""
        return [("whole", self)]

    def squared_error(self, stats: Statistics) -> float:
        """Relative, of a fit that is thrown away; `error_left_out` where that is not measured."""
        return self.error_left_out

    def check(self, stats: Statistics) -> None:
        """Raise ValueError, naming the site, if a weight or an input is not finite or a statistic saw no token."""
        for site in self.sites:
            if not is_finite(site.weight):
                raise ValueError(f"{site.name}: the weight holds NaN or infinite values; nothing was changed there")
            for kind in stats[site.name][0] if site.name in stats else ():
                seen = [of_expert[kind] for of_expert in stats[site.name]]
                if not any(statistic.num_tokens for statistic in seen):
                    raise ValueError(
                        f"{site.name}: no calibration token reached this site, so {self.method.name} cannot be fitted"
                    )
                if not all(statistic.is_finite for statistic in seen):
                    raise ValueError(f"{site.name}: its inputs hold NaN or infinite values; nothing was changed there")

    def new_statistics(self, dtype: torch.dtype) -> Statistics:
        """Empty ones of what is needed: one for a linear layer, one for each expert of a stack."""
        sites: dict[str, Site] = {site.name: site for site in self.sites}
        found: Statistics = {}
        for name, kinds in self.needs().items():
            site = sites[name]
            found[name] = [
                {kind: kind(site.in_features, site.weight.device, dtype) for kind in kinds}
                for _ in range(site.num_experts)
            ]
        return found

    def costs(self) -> dict[str, Cost]:
        """What each of the operators will cost, foreseen, and beside it what it adds to the bias of its site."""
        sites: dict[str, Site] = {site.name: site for site in self.sites}
        found: dict[str, Cost] = {}
        for name, (operator, owners) in at_sites(self.empty()).items():
            site = sites.get(name)
            cost = cost_with(operator, owners, 1 if site is None else site.experts_per_token)
            if site is not None and site.kind != "block":
                fitted = operator.bias.numel() if isinstance(operator.bias, Tensor) else 0
                held = 0 if site.bias is None else site.bias.numel()
                cost = with_more_bits(cost, 8 * site.weight.dtype.itemsize * max(0, fitted - held), site)
            found[name] = cost
        return found


def at_sites(operators: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, list[Owner]]]:
    """The operators that sites get, each with the owners that none of those before it multiplies through."""
    known: set[Owner] = set()
    found: dict[str, tuple[nn.Module, list[Owner]]] = {}
    for name, operator in operators.items():
        if not isinstance(operator, Owner):
            views = [part for part in operator.modules() if isinstance(part, View)]
            new = list(dict.fromkeys(view.connected for view in views if view.connected not in known))
            known.update(new)
            found[name] = operator, new
    return found


def cost_with(operator: nn.Module, owners: Iterable[Owner], experts_per_token: int = 1) -> Cost:
    """Of an operator and of what stands elsewhere for it and for others: that costs parameters and bits only here."""
    cost = cost_of(operator, experts_per_token)
    for owner in owners:
        more = owner.cost
        cost = cost._replace(
            parameters=cost.parameters + more.parameters,
            bits=cost.bits + more.bits,
            bytes_per_token=cost.bytes_per_token + more.bytes_per_token,
        )
    return cost


def with_more_bits(cost: Cost, bits: int, site: Site) -> Cost:
    total = cost.bits + bits
    return cost._replace(bits=total, bytes_per_token=total // 8 * site.experts_per_token // site.num_experts)


def not_finite(operator: nn.Module) -> str:
    return f"the fitted {type(operator).__name__} holds NaN or infinite values; nothing was changed there"
