"""Owners and their views owe what operators owe: `to_dense` of a view is the oracle, the owner's parameters are all."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from relative import assert_relative
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from owners import SharedBasis
from tensormix.operators import (
    OPERATORS,
    LowRank,
    MixT,
    Operator,
    Quantized,
    Siblings,
    SparseTuckerHeads,
    StructuredLinear,
    Sum,
    TuckerHeads,
    View,
    build,
    connect,
)
from tensormix.operators.quantized import on_meta
from tensormix.sites import cost_of, macs_per_token

I = 32
SHAPES = {"a": (32, I), "b": (16, I), "c": (48, I)}


def bases():
    return SharedBasis.fit({part: torch.randn(shape) for part, shape in SHAPES.items()}, rank=6)


def siblings():
    made = {part: MixT.from_dense(torch.randn(SHAPES[part]), num_branches=3) for part in "bac"}
    return Siblings(names=list(made), parts=list(made.values()))


def quantized():
    """Both cores and basis in 8 bits."""
    plain = bases()
    cores = {part: Quantized.of(plain._core(part), bits=8) for part in plain.cores}
    return SharedBasis(basis=Quantized.of(plain.basis, bits=8), cores=cores)


def tucker():
    """Heads of 8 channels: 4 of them, 2, and 6."""
    parts = [(name, O // 8, True) for name, (O, _) in SHAPES.items()]
    made = TuckerHeads(hidden_size=I, head_dim=8, parts=parts, ranks=(5, 3, 1))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def sparse_tucker():
    """The same with a quarter of the entries of each core, the others zero."""
    dense = tucker()
    sizes = [core.numel() // 4 for name, core in dense.named_parameters() if name.startswith("core")]
    made = SparseTuckerHeads(**dense.sizes, num_values=sizes)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.startswith("core"):
                made.fill_core(int(name[-1]), parameter)
            else:
                made.get_parameter(name).copy_(parameter)
    return made


OWNERS = {
    "tucker": tucker,
    "sparse_tucker": sparse_tucker,
    "bases": bases,
    "siblings": siblings,
    "quantized": quantized,
}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(OPERATORS, "SharedBasis", SharedBasis)


@pytest.fixture(params=OWNERS, ids=str)
def owner(request):
    return OWNERS[request.param]()


class Holder(nn.Module):
    """A module whose children are views and their owner, as in a model."""

    def __init__(self, owner, name="basis"):
        super().__init__()
        self.layers = nn.Module()
        for part, view in owner.views(name).items():
            self.layers.add_module(part, view)
        self.add_module(name, owner)

    def view(self, part):
        return self.layers.get_submodule(part)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_view_is_its_dense_product_in_any_batch(owner, dtype):
    holder = Holder(owner).to(dtype)
    for part, (O, _) in SHAPES.items():
        for batch in ((), (0,), (2, 3)):
            x = torch.randn(*batch, I, dtype=dtype)
            y = holder.view(part)(x)
            assert y.dtype == dtype and y.shape == (*batch, O)
            truth = x.double() @ holder.view(part).to_dense().double().T
            assert_relative(y.double(), truth, 32 * torch.finfo(dtype).eps, part)


@pytest.mark.parametrize("make", [bases, siblings])
def test_gradients_of_all_views_meet_in_the_owner(make):
    holder = Holder(make()).double()
    xs = {part: torch.randn(5, I, dtype=torch.float64, requires_grad=True) for part in SHAPES}
    wanted = [*xs.values(), *holder.parameters()]
    fast = sum(holder.view(part)(x).square().sum() for part, x in xs.items())
    slow = sum((x @ holder.view(part).to_dense().T).square().sum() for part, x in xs.items())
    for a, b in zip(torch.autograd.grad(fast, wanted), torch.autograd.grad(slow, wanted), strict=True):
        assert_relative(a, b, 1e-12, "gradient")


def test_the_products_of_all_parts_at_once_are_those_of_each(owner):
    x = torch.randn(7, I)
    assert owner(x).keys() == SHAPES.keys()
    for part, y in owner(x).items():
        torch.testing.assert_close(y, owner(x, part), rtol=1e-5, atol=1e-5)


def test_specs_survive_json_and_rebuild_both(owner):
    holder = Holder(owner)
    specs = json.loads(json.dumps({name: part.spec for name, part in parts_of(holder)}, sort_keys=True))
    twin = nn.Module()
    twin.layers = nn.Module()
    for name, spec in specs.items():
        parent, _, child = name.rpartition(".")
        twin.get_submodule(parent).add_module(child, build(spec))
    assert connect(twin) == []
    twin.load_state_dict(holder.state_dict())
    x = torch.randn(4, I)
    for part in SHAPES:
        assert torch.equal(twin.layers.get_submodule(part)(x), holder.view(part)(x))
    assert {name: part.spec for name, part in parts_of(twin)} == specs


def parts_of(holder):
    return [*((f"layers.{name}", view) for name, view in holder.layers.named_children()), ("basis", holder.basis)]


def test_costs_are_the_owners_once_and_the_products_of_each_view(owner):
    holder = Holder(owner)
    views = [holder.view(part) for part in SHAPES]
    assert all((view.cost.parameters, view.cost.bits, view.cost.bytes_per_token) == (0, 0, 0) for view in views)
    assert owner.cost.macs == 0
    whole = cost_of(holder)
    assert whole == tuple(sum(costs) for costs in zip(owner.cost, *(view.cost for view in views), strict=True))
    with FlopCounterMode(display=False) as counter:
        for view in views:
            view(torch.randn(7, I))
    assert counter.get_total_flops() == 2 * 7 * macs_per_token(holder)
    empty = on_meta(holder)
    assert cost_of(empty) == whole


def test_on_meta_and_back_again(owner):
    holder = Holder(owner)
    with torch.device("meta"):
        twin = build(owner.spec)
    assert {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in owner.state_dict().items()}
    assert twin.spec == owner.spec and twin.cost == owner.cost
    assert {t.device.type for t in on_meta(holder).view("a").connected.state_dict().values()} == {"meta"}


def test_a_view_holds_nothing_but_its_bias(owner):
    view = Holder(owner).view("b")
    assert list(view.parameters()) == [] and {k: t.numel() for k, t in view.state_dict().items()} == {"weight": 0}
    x, bias = torch.randn(3, I), torch.randn(16)
    plain = view(x)
    view.bias = nn.Parameter(bias)
    assert torch.equal(view(x), plain + bias) and view.cost.parameters == 0


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda holder: pickle.loads(pickle.dumps(holder))], ids=["copy", "pickle"]
)
def test_a_copy_has_an_owner_of_its_own(owner, copied):
    """Whichever of the two is copied first."""
    for first in ("views", "owner"):
        holder = Holder(owner)
        if first == "owner":
            holder._modules = dict(reversed(holder._modules.items()))
        twin = copied(holder)
        assert all(twin.view(part).owner is twin.basis for part in SHAPES) and twin.basis is not holder.basis
        x = torch.randn(3, I)
        wanted = holder.view("c")(x)
        with torch.no_grad():
            for tensor in holder.basis.state_dict().values():
                tensor.zero_()
        assert torch.equal(twin.view("c")(x), wanted)
        holder.basis.load_state_dict(twin.basis.state_dict())


def test_a_copy_of_a_view_alone_is_whole_until_it_is_put_into_a_model(owner):
    holder = Holder(owner)
    alone, x = copy.deepcopy(holder.view("a")), torch.randn(2, I)
    assert alone.owner is not holder.basis and torch.equal(alone(x), holder.view("a")(x))
    holder.layers.a = alone
    assert connect(holder) == [] and alone.owner is holder.basis


def test_the_nearest_owner_of_the_name_is_taken():
    inner, outer = bases(), bases()
    model = nn.Module()
    model.basis, model.near, model.far = outer, Holder(inner), nn.Module()
    model.far.a = View(I, 32, owner="basis", part="a")
    model.far.sum = Sum(terms=[View(I, 32, owner="basis", part="a"), LowRank.from_dense(torch.randn(32, I), rank=1)])
    assert connect(model) == []
    assert model.near.view("a").owner is inner and model.far.a.owner is outer
    assert model.far.sum.terms[0].owner is outer


def test_what_is_missing_is_named_and_does_not_multiply():
    model = nn.Module()
    model.q = View(I, 32, owner="basis", part="a")
    assert connect(model) == ["q"]
    with pytest.raises(RuntimeError, match="the owner 'basis' of 'a' is not there"):
        model.q(torch.randn(2, I))
    model.basis = bases()
    assert connect(model) == [] and model.q(torch.randn(2, I)).shape == (2, 32)


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (View(I, 32, owner="basis", part="aa"), ["q", "'aa'", "did you mean 'a'", "a, b, c"]),
        (View(I, 32, owner="basis", part="b"), ["q", "'b'", "16x32", "32x32"]),
    ],
)
def test_a_part_that_does_not_fit_is_refused_with_its_place(view, words):
    model = nn.Module()
    model.q, model.basis = view, bases()
    with pytest.raises(ValueError) as error:
        connect(model)
    assert all(word in str(error.value) for word in words)


def test_a_view_is_neither_fitted_nor_quantised_alone():
    view = Holder(bases()).view("a")
    with pytest.raises(TypeError, match="owner"):
        View.from_dense(torch.randn(4, 4))
    with pytest.raises(ValueError, match="owner"):
        Quantized.of(view, bits=8)


def test_every_owner_is_an_operator_and_every_view_a_linear_one(owner):
    assert isinstance(owner, Operator) and not isinstance(owner, StructuredLinear)
    assert isinstance(Holder(owner).view("a"), StructuredLinear)
