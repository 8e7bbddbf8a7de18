"""What is done while siblings are one product: calls, hooks, copies, threads, compiling, recovery."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from fused_models import ATTENTION, PLAN, Products, compressed, logits
from tensormix.compression import compress
from tensormix.inference.faster import dense_where_faster
from tensormix.inference.siblings import fuse_siblings
from tensormix.models import load_model, load_tokenizer
from tensormix.operators import LowRank, MixT, Siblings, Sum
from tensormix.recover import recover
from tensormix.recover.rates import compressed_parameters, rate_factors
from tensormix.settings import Recover, Source
from tensormix.sites import blocks
from zoo import token_ids


@pytest.fixture(scope="module")
def llama():
    return compressed("llama")


class Cross(nn.Module):
    """Attends from x to another text, calls k before q, and q twice."""

    def __init__(self):
        super().__init__()
        for name in ATTENTION:
            layer = MixT(32, 32, num_branches=2)
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
            setattr(self, name, layer)

    q_proj: Any
    k_proj: Any
    v_proj: Any

    def forward(self, x, other):
        return self.k_proj(other), self.q_proj(x), self.v_proj(other), self.q_proj(x), self.q_proj(x + 1)


def test_each_layer_gets_the_input_that_it_was_called_with():
    torch.manual_seed(0)
    cross: Any = Cross()
    model = nn.Sequential(cross)
    x, other = torch.randn(4, 32), torch.randn(6, 32)
    wanted = cross(x, other)
    with fuse_siblings(model):
        torch.testing.assert_close(cross(x, other), wanted)
        torch.testing.assert_close(cross.q_proj(x), wanted[1])  # outside of the forward of the parent


def test_hooks_see_every_layer(llama):
    seen = []
    watched: Any = blocks(llama)[-1].self_attn
    handle = watched.v_proj.register_forward_hook(lambda *_: seen.append("before"))
    with fuse_siblings(llama) as rows:
        why = {tuple(row["siblings"]): row["why"] for row in rows[2:]}
        assert "hooks or a forward of its own" in why["v_proj",] and why["q_proj", "k_proj"] == ""
        logits(llama)
        watched.k_proj.register_forward_pre_hook(lambda *_: seen.append("inside"))
        logits(llama)
    handle.remove()
    assert seen == ["before", "inside", "before"]


def test_a_second_time_inside_there_is_nothing_left_to_do(llama):
    before = logits(llama)
    with fuse_siblings(llama), fuse_siblings(llama) as rows:
        assert {row["chosen"] for row in rows} == {"separate"}
        torch.testing.assert_close(logits(llama), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(llama), before)


def test_what_is_replaced_inside_is_used(llama):
    model = copy.deepcopy(llama)
    attention: Any = blocks(model)[-1].self_attn
    with fuse_siblings(model):
        with torch.no_grad():
            zero = LowRank(32, 16, rank=1)
            for parameter in zero.parameters():
                parameter.zero_()
        attention.k_proj = Sum(terms=[zero])
        replaced = logits(model)
    assert type(attention.k_proj) is Sum and type(attention.q_proj) is MixT
    assert torch.allclose(logits(model), replaced, atol=1e-5)
    assert not torch.allclose(replaced, logits(llama), atol=1e-5)


def test_a_copy_made_inside_is_a_fused_model_of_its_own(llama):
    before = logits(llama)
    with fuse_siblings(llama):
        twin = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(0.5)
        with Products() as products:
            torch.testing.assert_close(logits(twin), before, rtol=1e-5, atol=1e-5)
        for parameter in llama.parameters():
            parameter.mul_(2)
    assert products.calls["mixt_siblings"] == 4


def test_threads_do_not_mix_their_inputs(llama):
    wanted = [logits(llama, seed) for seed in range(4)]
    found = {}

    def work(seed):
        found[seed] = [logits(llama, seed) for _ in range(5)]

    with fuse_siblings(llama):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed in range(4):
        for one in found[seed]:
            torch.testing.assert_close(one, wanted[seed], rtol=1e-5, atol=1e-5)


def test_it_compiles_in_one_graph(llama):
    before, targets = logits(llama), Counter()

    def backend(graph, _):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph

    with fuse_siblings(llama), torch.no_grad():
        compiled = torch.compile(llama.forward, fullgraph=True, backend=backend)
        found = compiled(input_ids=token_ids(seed=3), use_cache=False).logits
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)
    assert sum(number for name, number in targets.items() if "mixt_siblings" in name) == 4


def test_it_generates_with_a_static_cache(llama):
    ids = token_ids()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = llama.generate(ids, **options)
    with fuse_siblings(llama):
        assert torch.equal(llama.generate(ids, **options), before)
        assert torch.equal(llama.generate(ids, cache_implementation="static", **options), before)


def test_dense_where_faster_works_inside(llama):
    before = logits(llama)
    with fuse_siblings(llama), dense_where_faster(llama, num_tokens=1, repeats=1):
        torch.testing.assert_close(logits(llama), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(llama), before)


@pytest.mark.parametrize("recompute", [False, True])
def test_recovery_inside_ends_in_the_same_model(tiny, tmp_path, recompute):
    wanted = Recover(
        text=(Source(exam=True),), steps=3, batch_size=2, window=24, learning_rate=1e-2, recompute=recompute
    )
    after = []
    for fused in (False, True):
        model = load_model(str(tiny), dtype="float32")
        compress(model, PLAN)
        if fused:
            with fuse_siblings(model), Products() as products:
                recover(model, load_tokenizer(str(tiny)), wanted, folder=tmp_path / "c", seed=0)
            assert products.calls["mixt_siblings"] >= 3 * 4 * (2 if recompute else 1)
        else:
            recover(model, load_tokenizer(str(tiny)), wanted, folder=tmp_path / "c", seed=0)
        after.append(dict(model.state_dict()))
    torch.testing.assert_close(after[1], after[0], rtol=1e-3, atol=1e-5)


def test_what_recovery_asks_of_parameters_is_the_same_inside(llama):
    apart = sum(p.numel() for p in compressed_parameters(llama)), sorted(set(rate_factors(llama).values()))
    with fuse_siblings(llama):
        together = sum(p.numel() for p in compressed_parameters(llama)), sorted(set(rate_factors(llama).values()))
        stacked: Any = next(m for m in llama.modules() if isinstance(m, Siblings)).core_0
        assert rate_factors(llama)[stacked] == 4
    assert together == apart
