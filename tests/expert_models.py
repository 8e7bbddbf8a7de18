"""What tests of experts ask of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tensormix.operators import ExpertStack, LowRank
from tensormix.sites import Site, find_sites
from tensormix.sites.fused_experts import open_experts
from zoo import token_ids

UP, DOWN = "model.layers.2.mlp.experts.gate_up", "model.layers.2.mlp.experts.down"


def stacks(model: nn.Module) -> list[Site]:
    return [site for site in find_sites(model) if site.kind == "experts"]


def site_at(model: nn.Module, name: str) -> Site:
    return next(site for site in find_sites(model) if site.name == name)


def open_all(model: nn.Module) -> None:
    for name in dict.fromkeys(site.name.rpartition(".")[0] for site in stacks(model)):
        open_experts(model, name)


def low_rank(site: Site, rank: int) -> ExpertStack:
    weights = (site.expert_weight(expert) for expert in range(site.num_experts))
    return ExpertStack.from_experts([LowRank.from_dense(weight, rank=rank) for weight in weights])


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(token_ids(seed=3)).logits
