"""The dense linear layers that are rewritten together, and their new values.

Shape letters: I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from tensormix.sites import Site, find_sites


def groups(model: nn.Module, roles: set[str]) -> Iterator[dict[str, Site]]:
    """The dense linear layers with these roles, by role, for each module that holds some."""
    found: dict[str, dict[str, Site]] = {}
    for site in find_sites(model):
        if site.kind == "linear" and site.role in roles:
            found.setdefault(site.name.rpartition(".")[0], {})[site.role] = site
    yield from found.values()


def set_values(site: Site, weight: Tensor, bias: Tensor | None) -> None:  # (O, I), (O,)
    """Rounded to the dtype of the layer; without a bias its own stays."""
    site.weight.copy_(weight.clone())
    if bias is not None and site.bias is not None:
        site.bias.copy_(bias.clone())
