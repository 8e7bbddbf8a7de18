"""Sites that read one tensor gather their statistics once, and each has what it would have had alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.compression.observing import SharedInputs, observe
from tensormix.sites import find_sites
from tensormix.statistics import Gram, InputNorms, QRFactor
from zoo import make

SITES, KINDS, I = "qkv", (Gram, InputNorms, QRFactor), 6


def new():
    return {kind: kind(I) for kind in KINDS}


def values(of_site):
    return of_site[Gram].sum, of_site[InputNorms].sum, of_site[QRFactor].factor


# Of each batch: which of three tensors, or of views of them, the sites read one after another.
BATCHES = st.lists(
    st.lists(st.tuples(st.sampled_from(SITES), st.integers(0, 2), st.booleans()), max_size=6), min_size=1, max_size=4
)


@settings(max_examples=200, deadline=None)
@given(batches=BATCHES, rows=st.integers(1, 5))
def test_shared_statistics_are_those_of_each_site_alone_to_the_bit(batches, rows):
    alone, together = ({name: new() for name in SITES} for _ in range(2))
    inputs = SharedInputs(together)
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        tensors = torch.randn(3, rows, I, generator=generator).unbind()
        for name, number, is_view in batch:
            x = tensors[number]
            inputs.see(name, x.view(1, rows, I) if is_view else x)
            for statistic in alone[name].values():
                statistic.update(x)
    inputs.finish()
    for name in SITES:
        counts = [[s.num_tokens for s in found[name].values()] for found in (alone, together)]
        assert counts[0] == counts[1]
        if counts[0][0]:
            assert all(torch.equal(*pair) for pair in zip(values(alone[name]), values(together[name]), strict=True))


@torch.no_grad()
def test_q_k_and_v_share_and_so_do_gate_and_up(monkeypatch):
    llama = make("llama")
    sites = {site.name: site for site in find_sites(llama) if site.block == 0 and site.kind == "linear"}
    stats = {name: [{Gram: Gram(site.in_features)}] for name, site in sites.items()}
    updates = []
    add = Gram._add
    monkeypatch.setattr(Gram, "_add", lambda self, tokens: (updates.append(self), add(self, tokens)))
    with observe(llama, sites, stats):
        for seed in range(3):
            llama(torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(seed)))
    held = {site.role: stats[name][0][Gram] for name, site in sites.items()}
    assert len({held[role].sum.data_ptr() for role in "qkv"}) == 1
    assert held["gate"].sum.data_ptr() == held["up"].sum.data_ptr() != held["q"].sum.data_ptr()
    assert {statistic.num_tokens for statistic in held.values()} == {54}
    assert len(updates) == 3 * 4  # of seven sites


def test_inputs_that_change_in_place_before_all_have_read_them_are_refused():
    inputs = SharedInputs({name: new() for name in SITES})
    for _ in range(2):
        x = torch.randn(4, I)
        inputs.see("q", x)
        inputs.see("k", x)
        inputs.see("v", x)
    x = torch.randn(4, I)
    inputs.see("q", x)
    x.mul_(2)
    with pytest.raises(ValueError, match=r"q.*in place"):
        inputs.see("k", x)
        inputs.finish()


def test_a_tensor_that_changed_since_another_site_read_it_is_another_one():
    stats = {name: new() for name in SITES}
    inputs, x = SharedInputs(stats), torch.ones(4, I)
    inputs.see("q", x)
    inputs.see("k", x.mul_(2))
    assert torch.equal(stats["k"][Gram].sum, 4 * stats["q"][Gram].sum)
