"""Methods that compete under one budget: each region gets the one by which the model loses least."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budget_plans import save_varied_llama
from plans import one_rule
from tensormix.allocation import allocate
from tensormix.allocation.choice import best_choice, contestants
from tensormix.allocation.regions import Candidate, Region
from tensormix.compression import compress
from tensormix.methods import Auto, FlatLlm, Mixt, Rtn, SvdLlm, ZeroMethod
from tensormix.models import load_model
from tensormix.settings import Budget
from tensormix.sites import find_sites
from zoo import make, token_ids

ALL = [{"name": "svd_llm"}, {"name": "flat_llm"}, {"name": "zero"}, {"name": "drop_blocks"}]
WINDOWS = [token_ids(rows=6, length=24, seed=3)]


def auto(among=ALL, **changes):
    return one_rule({"name": "auto", "among": among, "keeps": [0.5, 0.75], "tokens": 24} | changes)


def of_kind(found, kind):
    return [row for row in found.rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_varied_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def found(llama):
    return allocate(llama, auto(), Budget(keep=0.7, of="parameters"), WINDOWS)


def test_what_is_exact_in_a_block_is_chosen_there(tmp_path):
    """The MLP of the even blocks has low rank, so that svd_llm loses nothing there and flat_llm does; in the odd ones
    half of the neurons do nothing, and it is the other way round."""
    model = make("llama")
    with torch.no_grad():
        for site in find_sites(model):
            if site.kind == "linear" and site.role in ("gate", "up", "down"):
                if site.block % 2 == 0:
                    u, s, v = torch.linalg.svd(site.weight, full_matrices=False)
                    site.weight.copy_((u[:, :8] * s[:8]) @ v[:8])
                elif site.role == "down":
                    site.weight[:, ::2] = 0
                else:
                    site.weight[::2] = 0
    model.save_pretrained(tmp_path)
    plan = auto(ALL[:2], keeps=[0.5])
    plan = plan.model_copy(update={"root": (plan.root[0].model_copy(update={"sites": ("gate", "up", "down")}),)})
    found = allocate(tmp_path, plan, Budget(keep=0.5, of="parameters"), WINDOWS)
    chosen = {row["block"]: row["method"] for row in of_kind(found, "candidate") if row["chosen"]}
    assert chosen == {0: "svd_llm", 1: "flat_llm", 2: "svd_llm", 3: "flat_llm"}
    plans = {row["contender"]: row for row in of_kind(found, "contender")}
    assert plans["auto"]["measured"] == pytest.approx(0, abs=1e-5) and plans["auto"]["chosen"]
    assert min(plans["svd_llm"]["measured"], plans["flat_llm"]["measured"]) > 1e-3


def test_no_method_alone_is_predicted_or_measured_to_lose_less(found):
    plans = {row["contender"]: row for row in of_kind(found, "contender")}
    assert set(plans) >= {"auto", "svd_llm", "flat_llm", "drop_blocks", "uniform svd_llm", "uniform flat_llm"}
    known = [row for row in plans.values() if row["cost"] is not None]
    assert plans["auto"]["predicted"] == min(row["predicted"] for row in known)
    measured = [row for row in known if row["measured"] is not None]
    least = min(row["measured"] for row in measured)
    assert [row["measured"] for row in measured if row["chosen"]] == [least]
    left_out = [row for row in known if row["measured"] is None]
    assert all("uniform" in row["contender"] and row["predicted"] >= least for row in left_out)
    assert all(row["cost"] <= found.rows[0]["asked"] for row in known)


def test_the_rows_add_up(found, llama):
    total, sizes = found.rows[0], of_kind(found, "size")
    assert total["achieved"] == sum(row["cost"] for row in sizes) <= total["asked"]
    best = next(row for row in of_kind(found, "contender") if row["chosen"])
    chosen = [row for row in of_kind(found, "candidate") if row["chosen"]]
    assert sum(row["loss"] for row in chosen) == pytest.approx(best["predicted"]) == pytest.approx(total["error"])
    model = load_model(llama)
    rows = compress(model, found.plan, WINDOWS)
    costs = {row["site"]: row["cost"] for row in sizes if row["method"] != "dense"}
    assert {row["site"]: row["parameters"] for row in rows} == costs
    assert {row["site"]: row["method"] for row in rows} == {
        row["site"]: row["method"] for row in sizes if row["method"] != "dense"
    }


def test_each_candidate_is_measured_with_all_else_dense(found, llama):
    """As the long way says: the fit on the dense model's inputs, in the whole model, from the first block on."""
    row = next(r for r in of_kind(found, "candidate") if (r["block"], r["method"], r["size"]) == (2, "svd_llm", 0.5))
    model, dense = load_model(llama), load_model(llama)
    assert row["region"] == "model.layers.2.self_attn"
    plan = one_rule({"name": "svd_llm", "keep": 0.5}, blocks=2, sites=["q", "k", "v", "o"])
    compress(model, plan, [WINDOWS[0][:4]])
    with torch.no_grad():
        p, q = (m(WINDOWS[0][4:5]).logits.double().log_softmax(-1) for m in (dense, model))
    each = (p.exp() * (p - q)).sum(-1).flatten()
    assert row["loss"] == pytest.approx(float(each.mean()), rel=1e-3)
    assert row["loss_error"] == pytest.approx(float(each.std()) / len(each) ** 0.5, rel=1e-3)


def test_the_same_plan_again_and_in_bits_and_macs(llama, found):
    again = allocate(llama, auto(), Budget(keep=0.7, of="parameters"), WINDOWS)
    assert again.plan == found.plan and again.rows == found.rows
    for of in ("bits", "macs", "bytes_per_token"):
        other = allocate(llama, auto(ALL[:1]), Budget(keep=0.7, of=of, measure="loss"), WINDOWS)
        assert other.rows[0]["of"] == of and other.rows[0]["achieved"] <= other.rows[0]["asked"]


def test_few_sizes_are_tried_one_by_one_and_a_size_that_is_given_stays(llama):
    among = [{"name": "rtn", "group": 16}, {"name": "rtn", "bits": 3, "group": 8}, {"name": "mixt"}]
    found = allocate(llama, auto(among, keeps=[0.2, 0.3, 0.4, 0.5, 0.6]), Budget(keep=0.3), WINDOWS)
    sizes = {}
    for row in of_kind(found, "candidate"):
        sizes.setdefault(row["method"], set()).add(row["size"])
    assert sizes["rtn group=16"] == {2, 3, 4, 8} and sizes["rtn bits=3 group=8"] == {3}
    assert {m.name for rule in found.plan.root for m in [rule.method]} <= {"rtn", "mixt"}


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_choice_is_the_best_of_all_that_there_are(data):
    """Against every combination of candidates, blocks taken whole among them."""
    regions, losses = [], {}
    for block in range(data.draw(st.integers(1, 3))):
        names = [f"{block}.a", f"{block}.b"][: data.draw(st.integers(1, 2))]
        parts = [Region(name, block, (), False, 10) for name in names]
        whole = [Region(f"{block}", block, (), True, 10 * len(parts))] if data.draw(st.booleans()) else []
        for region in [*parts, *whole]:
            for label in data.draw(st.sets(st.sampled_from("xyz"))):
                candidate = Candidate(label, None, (), data.draw(st.integers(0, region.dense_cost - 1)))
                region.candidates.append(candidate)
                losses[candidate] = float(data.draw(st.integers(-2, 9)))
        regions += [*parts, *whole]
    every = []
    for block in {region.block for region in regions}:
        parts = [[None, *r.candidates] for r in regions if r.block == block and not r.is_block]
        wholes = [(c,) for r in regions if r.block == block and r.is_block for c in r.candidates]
        split = [
            [(10 if c is None else c.cost, 0.0 if c is None else losses[c]) for c in one] for one in product(*parts)
        ]
        every.append([(sum(a for a, _ in one), sum(b for _, b in one)) for one in split])
        every[-1] += [(c.cost, losses[c]) for (c,) in wholes]
    sums = [(sum(c for c, _ in one), sum(e for _, e in one)) for one in product(*every)]
    units = data.draw(st.integers(min(cost for cost, _ in sums), max(cost for cost, _ in sums)))
    found = best_choice("auto", regions, losses, units)
    assert found.predicted == min(error for cost, error in sums if cost <= units) and found.cost <= units
    plans, _ = contestants(regions, losses, "xyz", units, 0.5)
    assert all(found.predicted <= plan.predicted for plan in plans)


def test_labels_tell_methods_of_one_name_apart():
    one = Auto(among=(SvdLlm(keep=1.0), SvdLlm(keep=0.5), SvdLlm(keep=1.0, update=True), FlatLlm(keep=1.0)))
    assert list(one.labels) == ["svd_llm", "svd_llm keep=0.5", "svd_llm update=True", "flat_llm"]
    assert Auto(among=(ZeroMethod(), Mixt(num_branches=1), Rtn(bits=4))).labels["rtn"] == Rtn(bits=4)
