"""Parameters of several sites: an owner holds them once, and at each site a view multiplies through it.

Shape letters: ... leading batch axes, I in_features, O out_features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from tensormix.operators.base import Operator, StructuredLinear, did_you_mean
from tensormix.operators.shared_calls import share_calls


class Owner(Operator):
    """What several matrices W_part (O, I) are made of, each of them the matrix of one site.

    It stands once in a model, under a name of its own, in a module around all its users: so it is saved, counted,
    moved, sharded and trained once, like any module. It costs parameters and bits, and its views cost the products.
    Views call it as a module: whoever gathers or loads the weights of a module when it is called sees that.
    """

    # Whether one product gives all parts of one input (`multiply_all`): views that stand in one module then share it
    # in each call of that module.
    together: ClassVar[bool] = False

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Part -> (O, I)."""

    def forward(self, x: Tensor, part: str | None = None) -> Any:  # (..., I) -> (..., O)
        """The product with one part; without one, with all, by part."""
        return self.multiply_all(x) if part is None else self.multiply(x, part)

    @abstractmethod
    def multiply(self, x: Tensor, part: str) -> Tensor:  # (..., I) -> (..., O)
        """x @ W_part.T without forming W_part."""

    def multiply_all(self, x: Tensor) -> dict[str, Tensor]:  # (..., I) -> (..., O) each
        return {part: self.multiply(x, part) for part in self.shapes}

    @abstractmethod
    def to_dense(self, part: str) -> Tensor:  # (O, I)
        """W_part itself, written independently of `multiply` and differentiable."""

    @abstractmethod
    def macs_of(self, part: str) -> int:
        """Multiply-accumulates of `multiply` for one token."""

    @property
    def macs_per_token(self) -> int:
        return 0  # those of its views, which are counted where they stand

    @property
    def in_features(self) -> int:
        """Of the part with the most inputs."""
        return max(I for _, I in self.shapes.values())

    def views(self, name: str) -> dict[str, View]:
        """A view of each part, connected; `name` is what the owner is to be called in the model."""
        made = {part: View(I, O, owner=name, part=part) for part, (O, I) in self.shapes.items()}
        for view in made.values():
            view.connect(self)
        return made


class View(StructuredLinear):
    """One part of an owner, at one site. It holds nothing but the bias of the site.

    In a model its owner is the nearest one of this name: in the module around the view, or in one around that;
    `connect` finds it. The reference is no submodule, and `copy.deepcopy` of both copies it along; a copy of the view
    alone has an owner of its own, until it is connected in a model.

    Args:
        owner: the name of the owner.
        part: which of its matrices.
    """

    owner: Owner | None

    def __init__(self, in_features: int, out_features: int, *, owner: str, part: str) -> None:
        super().__init__(in_features, out_features)
        self.owner_name, self.part = owner, part
        vars(self)["owner"] = None

    @classmethod
    def from_dense(cls, weight: Tensor, **sizes: Any) -> NoReturn:  # (O, I)
        raise TypeError("a View is not fitted to a weight: its owner is, to the weights of all its views together")

    def connect(self, owner: Owner) -> None:
        """Multiply through `owner` from now on.

        Raises:
            ValueError: it has no such part, or one of another shape.
        """
        kind, shape = type(owner).__name__, owner.shapes.get(self.part)
        if shape is None:
            hint = did_you_mean(self.part, owner.shapes)
            known = ", ".join(owner.shapes)
            raise ValueError(f"View: the {kind} {self.owner_name!r} has no part {self.part!r}{hint} Known: {known}.")
        if shape != (self.out_features, self.in_features):
            raise ValueError(
                f"View: part {self.part!r} of the {kind} {self.owner_name!r} is {shape[0]}x{shape[1]}, but the view "
                f"is {self.out_features}x{self.in_features}"
            )
        vars(self)["owner"] = owner

    @property
    def connected(self) -> Owner:
        """The owner. Raises RuntimeError as long as there is none."""
        if self.owner is None:
            raise RuntimeError(f"View: the owner {self.owner_name!r} of {self.part!r} is not there; connect the model")
        return self.owner

    def multiply(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return self.connected(x, self.part).to(x.device)  # an owner of several blocks may be on another device

    def to_dense(self) -> Tensor:  # (O, I)
        return self.connected.to_dense(self.part)

    @property
    def sizes(self) -> dict[str, Any]:
        ends = {"in_features": self.in_features, "out_features": self.out_features}
        return {**ends, "owner": self.owner_name, "part": self.part}

    @property
    def macs_per_token(self) -> int:
        return self.connected.macs_of(self.part)


def connect(model: nn.Module) -> list[str]:
    """Connect every view in `model` with the nearest owner of its name.

    Returns:
        The names of the views for which there is none; they keep the owner that they may have.

    Raises:
        ValueError: as `View.connect`, with the name of the view.
    """
    missing: list[str] = []
    _connect(model, "", {}, missing)
    return missing


def _connect(module: nn.Module, prefix: str, around: Mapping[str, Owner], missing: list[str]) -> None:
    near = {**around, **{name: part for name, part in module.named_children() if isinstance(part, Owner)}}
    views: dict[Owner, dict[str, View]] = {}
    for name, part in module.named_children():
        if not isinstance(part, View):
            _connect(part, f"{prefix}{name}.", near, missing)
            continue
        owner = near.get(part.owner_name)
        if owner is None:
            missing.append(f"{prefix}{name}")
            continue
        try:
            part.connect(owner)
        except ValueError as reason:
            raise ValueError(f"{prefix}{name}: {reason}") from None
        views.setdefault(owner, {})[name] = part
    for owner, found in views.items():
        if owner.together and len(found) > 1:
            share_calls(module, found)
