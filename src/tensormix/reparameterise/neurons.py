"""The neurons of an MLP in another order.

Shape letters: F neurons of an MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tensormix.reparameterise.layers import groups, set_values
from tensormix.sites import Site
from tensormix.sites.symmetries import Rows, neurons_pass


@torch.no_grad()
def sort_neurons(model: nn.Module) -> list[str]:
    """Order the neurons of every MLP so that neighbours are alike, in place; the model computes the same.

    Neurons are placed by the leading left singular vector of their weights (incoming and outgoing, every row scaled to
    length one). Returns the names of the rewritten sites; MLPs whose layers have no known role, experts included, stay.

    Raises ValueError, before anything changes, if what lies between does not let another order pass.
    """
    done, found = [], list(groups(model, {"gate", "up", "gate_up", "down"}))
    for sites in found:
        _check(model, sites)
    for sites in found:
        into = [sites[role] for role in ("gate", "up", "gate_up") if role in sites]
        if "down" not in sites or not into:
            continue
        out, F = sites["down"], sites["down"].in_features
        rows = [part for site in into for part in site.weight.split(F)] + [out.weight.T]
        order = alike_order(torch.cat([row.double() for row in rows], dim=1))
        for site in into:
            whole = torch.cat([order + F * part for part in range(site.out_features // F)])
            set_values(site, site.weight[whole], None if site.bias is None else site.bias[whole])
        set_values(out, out.weight[:, order], None)
        done += [site.name for site in (*into, out)]
    return done


def alike_order(features: Tensor) -> Tensor:  # (N, I) -> (N,)
    """An order of the rows in which neighbours are alike: by the leading left singular vector, rows at length one."""
    scaled = features / features.norm(dim=1, keepdim=True).clamp_min(1e-30)
    leading = torch.linalg.svd(scaled - scaled.mean(0), full_matrices=False).U[:, 0]
    return leading.argsort(stable=True)


def _check(model: nn.Module, sites: dict[str, Site]) -> None:
    into = [sites[role] for role in ("gate", "up", "gate_up") if role in sites]
    if "down" not in sites or not into:
        return
    down = sites["down"]
    rows = [Rows(s.name, part) for s in into for part in torch.arange(s.out_features).split(down.in_features)]
    found = neurons_pass(model, down.block or 0, rows, down.name)
    if found is not None:
        raise ValueError(
            f"{down.name}: its neurons cannot come in another order without changing the model: {found.reason()}; "
            "nothing was changed"
        )
