"""What a budget is tried on: a model whose sites differ."""

import torch

from tensormix.allocation import Allocation
from tensormix.sites import find_sites
from zoo import make, token_ids

BATCHES = [token_ids(rows=4, length=16, seed=1)]


def save_varied_llama(folder):
    """GQA; the weights have spectra of their own, so that sites differ in what they lose."""
    model = make("llama")
    with torch.no_grad():
        for number, site in enumerate(find_sites(model)):
            if site.kind == "linear":
                u, s, v = torch.linalg.svd(site.weight, full_matrices=False)
                falling = torch.linspace(1, 0.05, len(s)) ** (1 + number % 5)
                site.weight.copy_(u * (s[0] * falling) @ v)
    model.save_pretrained(folder)
    return folder


def total(found: Allocation):
    return found.rows[0]
