"""The linear layers of one block that one method changes together: by role for the method, by name for the model.

Shape letters: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensormix.methods.base import Heads, JointMethod, Layer, Method, RoleError
from tensormix.operators import Concat, StructuredLinear
from tensormix.sites import FUSED, Site, head_counts, takes_turns

_SAME_INPUTS = {"k": "q", "v": "q", "up": "gate"}


class Group:
    """The sites of one block that share a joint method.

    Raises:
        ValueError: a site has no role that the method knows, two have the same, or the heads are not known or do not
            fit the shapes.
    """

    def __init__(self, model: nn.Module, method: JointMethod, sites: Iterable[Site]) -> None:
        self.method, self.sites = method, list(sites)
        counts = head_counts(model)
        self.heads = None if counts is None else Heads(*counts)
        self.groups: dict[str, int] = {}  # site name -> of a fused one: in how many pieces its parts take turns
        self.holder: dict[str, Site] = {}  # role -> the site that holds it
        for site in self.sites:
            turns = site.role == "qkv" and takes_turns(model, site)
            self.groups[site.name] = self._known_heads(site).num_kv_heads if turns else 1
            for role in _roles(site):
                if role not in method.roles:
                    known = ", ".join(method.roles)
                    raise ValueError(f"{site.name}: {method.name} does not know this layer; it works on {known}")
                if role in self.holder:
                    raise ValueError(
                        f"{site.name}: {method.name} takes one layer of each role in a block, but "
                        f"{self.holder[role].name} is {role} too; name the sites that you mean"
                    )
                self.holder[role] = site
        self._check_heads()

    def needs(self) -> dict[str, tuple[type, ...]]:
        """Site name -> the statistics of its inputs; where several sites have the same inputs, at the first of them."""
        found: dict[str, dict[type, None]] = {}
        for role in self.holder:
            found.setdefault(self._watched(role).name, {}).update(dict.fromkeys(self.method.needs_at(role)))
        return {name: tuple(kinds) for name, kinds in found.items() if kinds}

    def empty(self) -> dict[str, StructuredLinear]:
        """By site name, on meta. Raises ValueError, naming the site or the block, if the method cannot work here."""
        shapes = {role: (count, site.in_features) for role, site, count in self._counts()}
        try:
            return self._joined(self.method.empty(shapes, self.heads))
        except ValueError as reason:
            raise self._named(reason) from None

    def fit(self, stats: Mapping[str, list[dict[type, Any]]]) -> dict[str, StructuredLinear]:
        """By site name, each with the final bias of its layer. `stats` is by site name, as `needs` is.

        Raises ValueError, naming the site, if a layer cannot be fitted.
        """
        layers = {role: Layer(*self._part(role)) for role in self.holder}
        seen = {role: stats[self._watched(role).name][0] for role in self.holder if self.method.needs_at(role)}
        try:
            return self._joined(self.method.fit(layers, seen, self.heads))
        except ValueError as reason:
            raise self._named(reason) from None

    def _watched(self, role: str) -> Site:
        inputs = _SAME_INPUTS.get(role, role)
        return next(self.holder[other] for other in self.holder if _SAME_INPUTS.get(other, other) == inputs)

    def _counts(self) -> list[tuple[str, Site, int]]:
        """Every role with its site and its number of rows."""
        found = []
        for role, site in self.holder.items():
            parts = FUSED.get(site.role or "", ())
            if site.role == "qkv":
                heads = self._known_heads(site)
                found.append((role, site, heads.head_dim * (heads.num_heads if role == "q" else heads.num_kv_heads)))
            else:
                found.append((role, site, site.out_features // max(1, len(parts))))
        return found

    def _part(self, role: str) -> tuple[Tensor, Tensor | None]:  # (O, I), (O,)
        """What belongs to the role: views, unless the parts take turns."""
        site = self.holder[role]
        roles, groups = _roles(site), self.groups[site.name]
        counts = [count // groups for _, holder, count in self._counts() if holder is site]

        def cut(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (groups, -1)).split(counts, dim=1)[roles.index(role)].flatten(0, 1)

        return cut(site.weight), None if site.bias is None else cut(site.bias)

    def _joined(self, operators: Mapping[str, StructuredLinear]) -> dict[str, StructuredLinear]:
        """By role -> by site, the parts of a fused layer put together again."""
        found = {}
        for site in self.sites:
            parts = [operators[role] for role in _roles(site)]
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
        for role, site in self.holder.items():
            if role not in ("q", "k", "v", "o"):
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

    def _named(self, reason: ValueError) -> ValueError:
        if isinstance(reason, RoleError):
            return ValueError(f"{self.holder[reason.role].name}: {reason.reason}")
        return ValueError(f"block {self.sites[0].block}: {reason}")


def groups_of(model: nn.Module, sites: Mapping[str, Site], chosen: Mapping[str, Method]) -> dict[str, Group]:
    """The groups of `chosen` (site name -> method), each by the name of its first site."""
    together: dict[tuple[int | None, JointMethod], list[Site]] = {}
    for name, method in chosen.items():
        if isinstance(method, JointMethod):
            together.setdefault((sites[name].block, method), []).append(sites[name])
    return {members[0].name: Group(model, method, members) for (_, method), members in together.items()}


def _roles(site: Site) -> tuple[str, ...]:
    return FUSED.get(site.role or "", (str(site.role),))
