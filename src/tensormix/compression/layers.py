"""The layers of a block, or of neighbouring ones, that are changed together: by role for the method, by name here.

Shape letters: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tensormix.compression.between import check_symmetries
from tensormix.compression.units import Fitted, Statistics, Unit, at_sites, not_finite
from tensormix.methods.base import Heads, JointMethod, Layer, RoleError
from tensormix.operators import Concat, StructuredLinear
from tensormix.sites import FUSED, Site, head_counts, takes_turns
from tensormix.sites.trials import is_as_built
from tensormix.statistics import is_finite

_SAME_INPUTS = {"k": "q", "v": "q", "up": "gate"}


class LayersUnit(Unit):
    """Layers that come to their method by role: "q" of one block, "0.q" and "1.q" of two.

    Raises:
        ValueError: a site has no role that the method knows, two have the same, the heads are not known or do not
            fit the shapes, or what lies between the layers does not let pass what the method changes in them.
    """

    method: JointMethod
    moves_bias = False  # the biases that the method gives are the final ones

    def __init__(self, model: nn.Module, method: JointMethod, sites: Iterable[Site]) -> None:
        super().__init__(model, method, sites)
        counts = head_counts(model, self.first_block)
        self.heads = None if counts is None else _as_built(Heads(*counts), model, self.sites)
        self.groups: dict[str, int] = {}  # site name -> of a fused one: in how many pieces its parts take turns
        self.holder: dict[str, Site] = {}  # role, of several blocks with the number of the block -> its site
        for site in self.sites:
            turns = site.role == "qkv" and takes_turns(model, site)
            self.groups[site.name] = self._known_heads(site).num_kv_heads if turns else 1
            for role, key in zip(_roles(site), self._keys(site), strict=True):
                if role not in method.roles:
                    known = ", ".join(method.roles)
                    raise ValueError(f"{site.name}: {method.name} does not know this layer; it works on {known}")
                if key in self.holder:
                    raise ValueError(
                        f"{site.name}: {method.name} takes one layer of each role in a block, but "
                        f"{self.holder[key].name} is {role} too; name the sites that you mean"
                    )
                self.holder[key] = site
        self._check_heads()
        check_symmetries(self)

    def needs(self) -> dict[str, tuple[type, ...]]:
        """Site name -> the statistics of its inputs; where several sites have the same inputs, at the first of them."""
        found: dict[str, dict[type, None]] = {}
        for role in self.holder:
            found.setdefault(self._watched(role).name, {}).update(dict.fromkeys(self.method.needs_at(_bare(role))))
        return {name: tuple(kinds) for name, kinds in found.items() if kinds}

    def empty(self) -> dict[str, nn.Module]:
        shapes = {role: (count, site.in_features) for role, site, count in self.counts()}
        with self.named():
            operators = self._joined(self.method.empty(shapes, self.heads))
        dtypes = {site.name: site.weight.dtype for site in self.sites}
        for name, (_, owners) in at_sites(operators).items():
            for owner in owners:
                owner.to(dtypes[name])
        return {name: operator.to(dtypes[name]) for name, operator in operators.items()}

    def fit(self, stats: Statistics, tidy: Callable[[], None] = lambda: None) -> Fitted:
        layers = {role: Layer(*self._part(role)) for role in self.holder}
        seen = {role: stats[self._watched(role).name][0] for role in self.holder if self.method.needs_at(_bare(role))}
        with self.named():
            operators = self._joined(self.method.fit(layers, seen, self.heads))
        for name, (operator, owners) in at_sites(operators).items():
            for part in (operator, *owners):
                if not all(is_finite(tensor) for tensor in part.state_dict().values()):
                    raise ValueError(f"{name}: {not_finite(part)}")
        return Fitted(operators, {site.name: {"relative_error": None} for site in self.sites})

    def _keys(self, site: Site) -> list[str]:
        before = f"{(site.block or 0) - self.first_block}." if self.first_block < self.last_block else ""
        return [f"{before}{role}" for role in _roles(site)]

    def _watched(self, role: str) -> Site:
        return next(self.holder[other] for other in self.holder if _inputs(other) == _inputs(role))

    def counts(self) -> list[tuple[str, Site, int]]:
        """Every role with its site and its number of rows."""
        found = []
        for role, site in self.holder.items():
            parts = FUSED.get(site.role or "", ())
            if site.role == "qkv":
                heads = self._known_heads(site)
                num_heads = heads.num_heads if _bare(role) == "q" else heads.num_kv_heads
                found.append((role, site, heads.head_dim * num_heads))
            else:
                found.append((role, site, site.out_features // max(1, len(parts))))
        return found

    def _part(self, role: str) -> tuple[Tensor, Tensor | None]:  # (O, I), (O,)
        """What belongs to the role: views, unless the parts take turns."""
        site = self.holder[role]
        return self.cut(role, site.weight), None if site.bias is None else self.cut(role, site.bias)

    def cut(self, role: str, whole: Tensor) -> Tensor:  # (O, ...) of its site -> (O, ...)
        """The rows that belong to the role."""
        site = self.holder[role]
        roles, groups = self._keys(site), self.groups[site.name]
        counts = [count // groups for _, holder, count in self.counts() if holder is site]
        return whole.unflatten(0, (groups, -1)).split(counts, dim=1)[roles.index(role)].flatten(0, 1)

    def _joined(self, operators: Mapping[str, StructuredLinear]) -> dict[str, StructuredLinear]:
        """By role -> by site, the parts of a fused layer put together again."""
        found = {}
        for site in self.sites:
            parts = [operators[role] for role in self._keys(site)]
            if len(parts) == 1:
                found[site.name] = parts[0]
                continue
            biases = [part.bias for part in parts]
            for part in parts:
                part.bias = None
            joined = Concat(parts=parts, groups=self.groups[site.name])
            if all(bias is not None for bias in biases):
                joined.bias = nn.Parameter(self._fused(site, [bias.detach() for bias in biases if bias is not None]))
            found[site.name] = joined
        return found

    def _fused(self, site: Site, biases: list[Tensor]) -> Tensor:  # (O,) each -> (O,)
        groups = self.groups[site.name]
        return torch.cat([bias.unflatten(0, (groups, -1)) for bias in biases], dim=1).flatten()

    def _known_heads(self, site: Site) -> Heads:
        if self.heads is None:
            raise ValueError(
                f"{site.name}: the config of the model does not say how many heads it has (num_attention_heads, "
                f"hidden_size), so {self.method.name} cannot work on its attention"
            )
        return self.heads

    def _check_heads(self) -> None:
        """The shapes must be what the config says, or the heads would be cut at the wrong places."""
        for key, site in self.holder.items():
            role = _bare(key)
            if role not in self.method.roles_of_heads and not (site.role == "qkv" and role in ("q", "k", "v")):
                continue
            heads = self._known_heads(site)
            width = heads.head_dim * (heads.num_kv_heads if role in ("k", "v") else heads.num_heads)
            if site.role == "qkv":
                width = heads.head_dim * (heads.num_heads + 2 * heads.num_kv_heads)
            size = site.in_features if role == "o" else site.out_features
            if size != width:
                raise ValueError(
                    f"{site.name}: {self.method.name} needs {width} features there, for {heads.num_heads} heads "
                    f"({heads.num_kv_heads} of keys and values) of {heads.head_dim} channels, but it has {size}"
                )

    @contextmanager
    def named(self) -> Iterator[None]:
        try:
            yield
        except RoleError as reason:
            raise ValueError(f"{self.holder[reason.role].name}: {reason.reason}") from None
        except ValueError as reason:
            last = "" if self.first_block == self.last_block else f" to {self.last_block}"
            raise ValueError(f"block {self.first_block}{last}: {reason}") from None


def _as_built(heads: Heads, model: nn.Module, sites: Iterable[Site]) -> Heads:
    """As the config says, or as an attention of another kind says of itself, if that is how its layers are built."""
    by_role = {site.role: site for site in sites}
    v, o = by_role.get("v"), by_role.get("o")
    if v is None or o is None:
        return heads
    own = getattr(model.get_submodule(o.name.rpartition(".")[0]), "head_dim", None)
    fits = (o.in_features, v.out_features) == (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim)
    block = o.block or 0
    shown = is_as_built(model, block, o.name, "inputs") and is_as_built(model, block, v.name, "outputs")
    if fits or not shown or not isinstance(own, int) or o.in_features % own or v.out_features % own:
        return heads
    built = Heads(o.in_features // own, v.out_features // own, own)
    return heads if built.num_heads % built.num_kv_heads else built


def _bare(key: str) -> str:
    """The role without the number of its block."""
    return key.rpartition(".")[2]


def _inputs(key: str) -> str:
    """The same for all layers that have the same inputs."""
    before, dot, role = key.rpartition(".")
    return before + dot + _SAME_INPUTS.get(role, role)


def _roles(site: Site) -> tuple[str, ...]:
    return FUSED.get(site.role or "", (str(site.role),))
