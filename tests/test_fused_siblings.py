"""q, k and v, or gate and up, in one call: the same outputs, training and checkpoint, in every family."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import tensormix.inference.siblings as module_under_test
from tensormix.inference.faster import dense_where_faster
from tensormix.inference.siblings import fuse_siblings
from tensormix.models import load_model, load_tokenizer
from tensormix.operators import LowRank, MixT, Sibling, Sum
from tensormix.plan import Plan
from tensormix.recover import recover
from tensormix.recover.rates import compressed_parameters, rate_factors
from tensormix.settings import Recover, Source
from tensormix.sites import blocks, macs_per_token
from tensormix.walk import compress
from zoo import ZOO, make, token_ids

PLAN = Plan.model_validate([{"blocks": "last 2", "method": {"name": "mixt", "num_branches": 3}}])
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
GROUPS = {"phi3": [], "gpt2": [], "gpt_neox": [], "opt": [ATTENTION], "gptj": [ATTENTION]}  # packed; not gated


class Products(TorchDispatchMode):
    """Counts the calls of our kernels."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tensormix":
            self.calls[func.name().removeprefix("tensormix::")] += 1
        return func(*args, **(kwargs or {}))


def compressed(family, plan=PLAN):
    model = make(family)
    compress(model, plan)
    return model


@torch.no_grad()
def logits(model, seed=3, rows=2, length=12):
    return model(input_ids=token_ids(rows, length, seed), use_cache=False).logits


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def llama():
    return compressed("llama")


@pytest.mark.parametrize("family", ZOO)
def test_a_model_gives_the_same_in_fewer_calls_and_gets_its_layers_back(family):
    model = compressed(family)
    before, modules, macs = logits(model), list(model.modules()), macs_per_token(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with Products() as apart:
        logits(model)
    with fuse_siblings(model) as rows, Products() as together:
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
        assert same_state(model.state_dict(), state)
        assert macs_per_token(model) == macs
    groups = GROUPS.get(family, [ATTENTION, MLP])
    assert [row["siblings"] for row in rows] == groups * 2
    assert all(row["chosen"] == "together" and not row["why"] for row in rows)
    others = apart.calls["mixt"] - 2 * sum(map(len, groups))
    assert together.calls == Counter({"mixt": others, **({"mixt_siblings": 2 * len(groups)} if groups else {})})
    assert list(model.modules()) == modules and not any("forward" in vars(module) for module in modules)
    assert torch.equal(logits(model), before)


def test_the_saved_folder_is_the_same_to_the_byte(tmp_path, llama):
    llama.save_pretrained(tmp_path / "apart")
    with fuse_siblings(llama):
        llama.save_pretrained(tmp_path / "together")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "together")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "apart" / name).read_bytes()
    assert torch.equal(logits(again), logits(llama))


def test_what_is_loaded_inside_stays(llama):
    other = compressed("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = copy.deepcopy(llama)
    with fuse_siblings(model):
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), logits(other))


def test_nothing_is_stored_twice(llama):
    count = sum(parameter.numel() for parameter in llama.parameters())
    operators = [module for module in llama.modules() if isinstance(module, MixT)]
    with fuse_siblings(llama):
        assert sum(parameter.numel() for parameter in llama.parameters()) == count
        assert sum(core.untyped_storage().nbytes() for op in operators[:3] for core in op.cores) == 0
    assert all(core.untyped_storage().nbytes() == core.nbytes for op in operators for core in op.cores)


def plan_of(*rules):
    return Plan.model_validate([{"blocks": "last 1", "sites": sites, "method": method} for sites, method in rules])


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (
            plan_of((["k", "v"], {"name": "mixt", "num_branches": 3}), (["q"], {"name": "svd", "keep": 0.5})),
            {
                ("k_proj", "v_proj"): "",
                ("q_proj",): "it is a LowRank, and only MixT layers become one product",
            },
        ),
        (
            plan_of((["q", "v"], {"name": "mixt", "num_branches": 3}), (["k"], {"name": "mixt", "num_branches": 2})),
            {
                ("q_proj", "v_proj"): "",
                ("k_proj",): "beside q_proj, num_branches is 3 and 2; beside v_proj, num_branches is 3 and 2",
            },
        ),
        (
            plan_of((["gate"], {"name": "mixt", "num_branches": 3})),
            {
                ("gate_proj",): "no other layer is left to be one product with",
                ("up_proj",): "it is a Linear, and only MixT layers become one product",
            },
        ),
    ],
)
def test_what_differs_stays_separate_and_is_told(plan, expected):
    model = compressed("llama", plan)
    before = logits(model)
    with fuse_siblings(model) as rows:
        assert {tuple(row["siblings"]): row["why"] for row in rows} == expected
        assert all((row["chosen"] == "together") == (not row["why"]) for row in rows)
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("separate", "chosen"), [(1.0, "separate"), (3.0, "together")])
def test_with_a_number_of_tokens_the_faster_form_is_chosen(llama, monkeypatch, separate, chosen):
    asked = []

    def clock(one, other, x, repeats):
        torch.testing.assert_close(one(x), other(x))
        asked.append((x.shape, repeats))
        return separate, 2.0

    monkeypatch.setattr(module_under_test, "milliseconds", clock)
    with fuse_siblings(llama, num_tokens=5, repeats=4) as rows:
        assert {(row["chosen"], row["separate_ms"], row["together_ms"]) for row in rows} == {(chosen, separate, 2.0)}
        assert any(isinstance(module, Sibling) for module in llama.modules()) == (chosen == "together")
    assert {row["why"] for row in rows} == ({""} if separate > 2 else {"together they are not faster at 5 tokens"})
    assert asked == [((5, 32), 4)] * 2  # one for each kind of group: the two blocks are alike


@pytest.mark.parametrize("sizes", [{"num_tokens": 0}, {"repeats": 0}])
def test_sizes_below_one_are_refused(llama, sizes):
    with pytest.raises(ValueError, match=r"^fuse_siblings: \w+ must be at least 1, got 0$"):
        fuse_siblings(llama, **sizes).__enter__()


def test_an_error_inside_leaves_the_model_as_it_was(llama):
    before, modules = logits(llama), list(llama.modules())
    with pytest.raises(RuntimeError, match="mine"), fuse_siblings(llama):
        raise RuntimeError("mine")
    assert list(llama.modules()) == modules and torch.equal(logits(llama), before)


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
        stacked: Any = next(m for m in llama.modules() if isinstance(m, Sibling)).siblings.core_0
        assert rate_factors(llama)[stacked] == 4
    assert together == apart
