"""What lies between layers that are changed together: it must let the change pass, or the method is refused there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tensormix.sites import Site
from tensormix.sites.families import role_of
from tensormix.sites.symmetries import Rows, neurons_pass, values_pass

if TYPE_CHECKING:
    from tensormix.compression.layers import LayersUnit


def check_symmetries(unit: LayersUnit) -> None:
    """Raise ValueError, naming the layers, if a symmetry that the method relies on is none of this model."""
    with torch.device("cpu"):
        _check(unit)


def _check(unit: LayersUnit) -> None:
    for before in dict.fromkeys(key.rpartition(".")[0] for key in unit.holder):
        keys = {key.rpartition(".")[2]: key for key in unit.holder if key.rpartition(".")[0] == before}
        if "neurons" in unit.method.symmetries and {"up", "down"} <= keys.keys():
            _check_neurons(unit, keys)
        if {"turned values", "mapped values"} & set(unit.method.symmetries) and {"v", "o"} <= keys.keys():
            _check_values(unit, keys)


def _check_values(unit: LayersUnit, keys: dict[str, str]) -> None:
    v, o = (unit.holder[keys[role]] for role in ("v", "o"))
    assert unit.heads is not None
    turned = "mapped values" not in unit.method.symmetries
    found = values_pass(unit.model, v.block or 0, _rows(unit, keys["v"]), o.name, unit.heads, orthogonal=turned)
    if found is None:
        return
    gates = [name for name in found.beside if role_of(name) not in ("q", "k", "qkv")]
    rest = "" if _roles(unit) == {"v", "o"} else f", and {unit.method.name} for other sites"
    raise ValueError(
        f"{', '.join(dict.fromkeys((v.name, o.name)))}: {unit.method.name} puts the values of each head into another "
        f"basis, which o undoes, but {found.reason(gates)}; take svd_llm for v and o there{rest}"
    )


def _check_neurons(unit: LayersUnit, keys: dict[str, str]) -> None:
    roles = [role for role in ("gate", "up") if role in keys]
    down, into = unit.holder[keys["down"]], [_rows(unit, keys[role]) for role in roles]
    for rows in into:
        if len(rows.rows) != down.in_features:
            raise ValueError(
                f"{rows.name}: {unit.method.name} takes each of its {len(rows.rows)} outputs for a neuron, but "
                f"{down.name} reads {down.in_features}; take svd_llm for both"
            )
    found = neurons_pass(unit.model, down.block or 0, into, down.name)
    if found is None:
        return
    names = ", ".join(dict.fromkeys(unit.holder[keys[role]].name for role in (*roles, "down")))
    if found.beside and not found.reader and not found.skipped:
        raise ValueError(
            f"{names}: {unit.method.name} changes gate, up, down together, but {', '.join(found.beside)} is not among "
            "its sites (or is no longer dense); give it sites: [gate, up, down], or take svd_llm there"
        )
    raise ValueError(
        f"{names}: {unit.method.name} puts the neurons into another order, but {found.reason()}; "
        f"take svd_llm for {', '.join((*roles, 'down'))} there"
        + ("" if _roles(unit) <= {"gate", "up", "down"} else f", and {unit.method.name} for other sites")
    )


def _rows(unit: LayersUnit, key: str) -> Rows:
    site: Site = unit.holder[key]
    return Rows(site.name, unit.cut(key, torch.arange(site.out_features)))


def _roles(unit: LayersUnit) -> set[str]:
    return {key.rpartition(".")[2] for key in unit.holder}
