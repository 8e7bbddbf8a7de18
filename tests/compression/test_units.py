"""Methods made in Python, one of each kind: in no table, and yet fitted, streamed, resumed, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from owners import SharedBasis
from plans import one_rule
from streamed import hashes, stop_at
from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.compression.kinds import parts_of, planned_units
from tensormix.compression.while_loading import CompressConfig
from tensormix.methods import BlockMethod, JointMethod, LinearMethod, ModelMethod, SpanMethod, StackMethod
from tensormix.models import load_model
from tensormix.operators import OPERATORS, Bypass, Dense, ExpertStack, LowRank, Owner, outermost
from tensormix.run.check import counts, replace_empty
from tensormix.sites import blocks, find_sites
from tensormix.statistics import Gram
from zoo import make, token_ids

BATCHES = [token_ids(seed=1), token_ids(seed=2, length=7)]


def meta_rank(rows: int, columns: int, rank: int) -> LowRank:
    with torch.device("meta"):
        return LowRank(columns, rows, rank=rank)


class Matrix(LinearMethod):
    source = "ours"
    summary = "Rank 1."
    name: str = "matrix"

    def empty(self, in_features, out_features):
        return meta_rank(out_features, in_features, 1)

    def fit(self, weight, stats):
        return LowRank.from_dense(weight, rank=1)


class Stack(StackMethod):
    """Rank 1 for the first expert, 2 for the second, and so on."""

    source = "ours"
    summary = "Each expert has a rank of its own."
    name: str = "stack"
    needs = (Gram,)

    def empty(self, num_experts, in_features, out_features):
        return ExpertStack.from_experts([meta_rank(out_features, in_features, 1 + e) for e in range(num_experts)])

    def fit(self, weight, stats):
        assert any(of_expert[Gram].num_tokens for of_expert in stats)
        return ExpertStack.from_experts([LowRank.from_dense(each, rank=1 + e) for e, each in enumerate(weight)])


class Basis(JointMethod):
    """The same role of two neighbouring blocks on the directions that both share: W V V^T."""

    source = "ours"
    summary = "Neighbours share a basis."
    name: str = "basis"
    roles = ("up",)
    needs = (Gram,)
    rank: int = 4

    @property
    def num_blocks(self):
        return 2

    def empty(self, shapes, heads):
        return {key: meta_rank(*shape, self.rank) for key, shape in shapes.items()}

    def fit(self, layers, stats, heads):
        assert set(layers) in ({"0.up", "1.up"}, {"up"}) and stats.keys() == layers.keys()
        basis = torch.linalg.svd(torch.cat([layer.weight for layer in layers.values()]))[2][: self.rank]
        made = {}
        for key, layer in layers.items():
            made[key] = LowRank(layer.weight.shape[1], layer.weight.shape[0], rank=self.rank)
            made[key].load_state_dict({"left": layer.weight @ basis.T, "right": basis, "weight": torch.empty(0)})
        return made


class Shared(Basis):
    """The same, with the directions stored once: both layers are views of one owner."""

    name: str = "shared"

    def empty(self, shapes, heads):
        columns = next(iter(shapes.values()))[1]
        with torch.device("meta"):
            cores = {str(number): Dense(self.rank, rows) for number, (rows, _) in enumerate(shapes.values())}
            owner = SharedBasis(basis=Dense(columns, self.rank), cores=cores)
            return dict(zip(shapes, owner.views("basis").values(), strict=True))

    def fit(self, layers, stats, heads):
        owner = SharedBasis.fit({str(number): layer.weight for number, layer in enumerate(layers.values())}, self.rank)
        return dict(zip(layers, owner.views("basis").values(), strict=True))


class Block(BlockMethod):
    source = "ours"
    summary = "Left out."
    name: str = "block"

    def replace(self, block, *, returns="tensor"):
        return Bypass(returns=returns, attention_type=getattr(block, "attention_type", None), sentinel="mlp.weight")


class Span(SpanMethod):
    """The first block stays as it is, made anew; those behind it are left out."""

    source = "ours"
    summary = "One for several."
    name: str = "span"

    def empty(self, blocks, hidden_size, *, returns="tensor"):
        return [copy.deepcopy(blocks[0]), *(Block().replace(block, returns=returns) for block in blocks[1:])]

    def fit(self, blocks, states, *, returns="tensor"):
        after = states.entering[0]
        for block in blocks[:1]:
            after = states.runs[0](block, after)
        assert len(states.leaving) == len(states.entering) and after.shape == states.leaving[0].shape
        facts = {"moved": float((after - states.leaving[0]).norm())}
        return self.empty(blocks, 0, returns=returns), facts


class Model(ModelMethod):
    source = "ours"
    summary = "Half of the channels, in an order of their own."
    name: str = "model"
    needs = (Gram,)

    def width(self, full):
        return full // 2

    def basis(self, stats, width):
        return torch.eye(stats[Gram].in_features, dtype=stats[Gram].mean.dtype)[:, :width]


KINDS = {
    "matrix": (one_rule(Matrix()), "llama"),
    "stack": (one_rule(Stack()), "qwen3_moe"),
    "layers": (one_rule(Basis(), blocks="0-2"), "llama"),
    "shared": (one_rule(Shared(), blocks="0-2"), "llama"),
    "block": (one_rule(Block(), blocks="1"), "llama"),
    "span": (one_rule(Span(), blocks="1-2"), "llama"),
    "model": (one_rule(Model()), "llama"),
}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(OPERATORS, "SharedBasis", SharedBasis)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_memory_from_files_and_foreseen(tmp_path, kind):
    plan, family = KINDS[kind]
    make(family).save_pretrained(tmp_path / "dense")
    model, empty = load_model(tmp_path / "dense"), make(family)
    rows = compress(model, plan, BATCHES)
    assert rows and {row["method"] for row in rows} == {kind if kind != "layers" else "basis"}
    foreseen = replace_empty(empty, plan)
    assert [(row["site"], row["parameters"]) for row in rows] == [(row["site"], row["parameters"]) for row in foreseen]
    assert counts(empty) == counts(model)
    streamed = compress_checkpoint(tmp_path / "dense", tmp_path / "out", plan, BATCHES)
    assert [{**row, "seconds": 0} for row in streamed] == [{**row, "seconds": 0} for row in rows]
    assert torch.equal(load_model(tmp_path / "out")(token_ids(seed=5)).logits, model(token_ids(seed=5)).logits)


def test_experts_of_different_rank_are_saved_and_loaded(tmp_path):
    plan, family = KINDS["stack"]
    model = make(family)
    rows = compress(model, plan, BATCHES)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    stack = again.get_submodule(rows[0]["site"])
    assert [stack.expert(e).sizes["rank"] for e in range(stack.num_experts)] == [1, 2, 3, 4]
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    assert rows[0]["parameters"] == sum(stack.expert(e).num_params for e in range(4))


@pytest.mark.parametrize("kind", ["layers", "shared", "span"])
@pytest.mark.parametrize("inputs", ["propagated", "dense"])
def test_several_blocks_are_resumed_as_a_whole(tmp_path, kind, inputs, monkeypatch):
    """Stopped at every site, and between the files of one unit: the same files in the end."""
    plan, family = KINDS[kind]
    make(family).save_pretrained(tmp_path / "dense")
    rows = compress_checkpoint(tmp_path / "dense", tmp_path / "straight", plan, BATCHES, inputs=inputs)
    for number in range(1, len(rows) + 1):
        out = tmp_path / f"out{number}"
        with pytest.raises(KeyboardInterrupt):
            compress_checkpoint(tmp_path / "dense", out, plan, BATCHES, stop_at(number), inputs=inputs)
        again = compress_checkpoint(tmp_path / "dense", out, plan, BATCHES, inputs=inputs)
        assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
        assert hashes(out) == hashes(tmp_path / "straight")
    from tensormix.compression.to_files import Disk

    leave = Disk.leave
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            Disk, "leave", lambda s, i, r: leave(s, i, r) if i != 2 else (_ for _ in ()).throw(KeyboardInterrupt)
        )
        compress_checkpoint(tmp_path / "dense", tmp_path / "torn", plan, BATCHES, inputs=inputs)
    compress_checkpoint(tmp_path / "dense", tmp_path / "torn", plan, BATCHES, inputs=inputs)
    assert hashes(tmp_path / "torn") == hashes(tmp_path / "straight")


def test_what_an_owner_costs_is_told_once_at_its_first_site():
    model = make("llama")
    foreseen = [cost for unit in planned_units(model, KINDS["shared"][0]) for cost in unit.costs().values()]
    rows = compress(model, KINDS["shared"][0], BATCHES)
    owners = sorted((owner for _, owner in outermost(model, Owner)), key=lambda owner: -owner.num_params)
    assert [row["parameters"] for row in rows] == [owners[0].num_params, 0, owners[1].num_params]
    assert [(cost.parameters, cost.bits, cost.macs) for cost in foreseen] == [
        (row["parameters"], row["bits"], row["macs_per_token"]) for row in rows
    ]
    assert sum(row["bits"] for row in rows) == sum(owner.num_bits for owner in owners)


def test_units_say_from_where_to_where_they_reach():
    model = make("llama")
    units = planned_units(model, KINDS["layers"][0])
    assert [(unit.first_block, unit.last_block) for unit in units] == [(0, 1), (2, 2)]
    assert parts_of(units, 4) == [range(0, 2), range(2, 3), range(3, 4)]
    assert [list(unit.needs().values()) for unit in units] == [[(Gram,), (Gram,)], [(Gram,)]]
    assert [unit.takes for unit in (u.method for u in planned_units(model, KINDS["span"][0]))] == ["span"]


def test_layers_of_several_modules_while_a_checkpoint_is_loaded(tmp_path):
    """They are fitted when the last of them is read."""

    class WithoutInputs(Basis):
        needs = ()

        def fit(self, layers, stats, heads):
            return super().fit(layers, dict.fromkeys(layers), heads)

    plan = one_rule(WithoutInputs(), blocks="0-2")
    model = make("llama")
    model.save_pretrained(tmp_path)
    rows = compress(model, plan)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=CompressConfig(plan))
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    assert [row["block"] for row in rows] == [0, 1, 2] and isinstance(blocks(loaded)[1], nn.Module)
    assert len([site for site in find_sites(loaded) if site.kind == "linear"]) == 4 * 7 - 3
