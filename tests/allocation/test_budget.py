"""A budget becomes a plan with sizes: exact in what it costs, better where it must be, and plain data afterwards."""

from math import floor

import pytest
import torch
from safetensors.torch import load_file

from budget_plans import BATCHES, save_varied_llama, total
from packed_checkpoints import save_packed
from plans import one_rule
from tensormix.allocation import allocate
from tensormix.allocation.survey import Survey, in_place
from tensormix.compression import Calibration, Home, compress
from tensormix.evaluate.divergence import divergences
from tensormix.methods import (
    BlastMethod,
    BttMethod,
    Coala,
    DenseSparseTt,
    DobiSvd,
    DropBlocks,
    FlatLlm,
    Gptq,
    HassleFree,
    Laser,
    MeanOutput,
    Mixt,
    MixtChain,
    MixtLowRank,
    MixtRotated,
    MixtSparse,
    MonarchMethod,
    RoundedLowRank,
    RoundedSparse,
    Rtn,
    Sola,
    Svd,
    SvdLlm,
    TensorTrainMethod,
    ZeroMethod,
)
from tensormix.models import load_model
from tensormix.plan import Plan, Rule
from tensormix.settings import Budget
from tensormix.sites import find_sites
from tensormix.statistics import Gram, QRFactor
from zoo import make

SIZEABLE = [
    Svd(keep=1.0),
    TensorTrainMethod(keep=1.0),
    TensorTrainMethod(keep=1.0, weighted=True, modes=3, steps=2),
    DenseSparseTt(keep=1.0, share=0.01),
    BttMethod(keep=1.0),
    BttMethod(keep=1.0, weighted=True, steps=2),
    BlastMethod(keep=1.0, blocks=2, steps=1),
    MonarchMethod(keep=1.0, steps=2),
    SvdLlm(keep=1.0),
    SvdLlm(keep=1.0, update=True),
    Coala(keep=1.0),
    Laser(keep_rank=1.0),
    DobiSvd(rank=1),
    DobiSvd(rank=1, storage="remapped"),
    Mixt(num_branches=1),
    MixtLowRank(keep=1.0, num_branches=3, rounds=2),
    MixtSparse(keep=1.0, num_branches=3, rounds=2),
    MixtChain(num_branches=1, steps=2),
    MixtRotated(num_branches=1, steps=2),
    Rtn(bits=8, group=16),
    Gptq(bits=8, group=16),
    RoundedLowRank(bits=2, group=16, rank=0, rounds=1),
    RoundedSparse(bits=2, group=16, share=0.0, rounds=1),
    Rtn(bits=4, granularity="channel", of=Svd(keep=1.0)),
    HassleFree(keep=1.0, rank=1, steps=2),
    HassleFree(keep=1.0, pattern="2:4", steps=2),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_varied_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("method", SIZEABLE, ids=lambda method: f"{method.name}-{method.size}")
def test_every_size_is_one_that_the_layer_allows_and_no_two_are_the_same(method):
    sizes = method.allowed_sizes(48, 80)
    assert sizes and len({method.sized(size).empty(48, 80).num_bits for size in sizes}) == len(sizes)
    again = type(method).model_validate_json(method.sized(sizes[0]).model_dump_json())
    assert again.empty(48, 80).spec == method.sized(sizes[0]).empty(48, 80).spec


@pytest.mark.parametrize(
    "method", [Svd(keep=1.0), SvdLlm(keep=1.0), Coala(keep=1.0), Laser(keep_rank=1.0), DobiSvd(rank=1)]
)
def test_the_spectrum_tells_the_error_that_a_fit_of_each_rank_has(method):
    torch.manual_seed(0)
    weight, inputs = torch.randn(24, 16, dtype=torch.float64), torch.randn(40, 16) @ torch.randn(16, 16)
    stats = {kind: kind(16) for kind in (Gram, QRFactor)}
    for statistic in stats.values():
        statistic.update(inputs)
    root = inputs.double() if method.needs else torch.eye(16, dtype=torch.float64)
    root = root / 40**0.5 if method.name in ("svd_llm", "dobi_svd") else root  # its Gram matrix is a mean
    values = method.spectrum(weight, stats)
    for size in method.allowed_sizes(16, 24):
        fitted = method.sized(size).fit(weight, stats)
        missed = float((root @ (weight - fitted.to_dense().detach()).T).square().sum())
        assert missed == pytest.approx(float(values[fitted.sizes["rank"] :].square().sum()), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("by", ["uniform", "greedy"])
@pytest.mark.parametrize("method", [*SIZEABLE, MeanOutput()], ids=lambda method: f"{method.name}-{method.size}")
def test_what_is_stored_afterwards_is_what_was_counted(llama, method, by):
    keep = 0.8
    budget = Budget(keep=keep, by=by, levels=3)
    if method.size is None:
        budget = Budget(keep=keep, by="sensitivity")
    found = allocate(llama, one_rule(method), budget, BATCHES)
    model = load_model(llama)
    before = sum(8 * s.weight.numel() * 4 for s in find_sites(model) if s.kind == "linear")
    rows = compress(model, found.plan, BATCHES)
    after = {row["site"]: row["bits"] for row in rows}
    extra = 32 * (method.name == "mean_output")  # the bias that the method itself adds
    for row in found.rows[1:]:
        site = model.get_submodule(row["site"])
        own = after.get(row["site"], row["dense_cost"])
        assert row["cost"] == own + (extra * site.out_features if row["site"] in after else 0)
    assert total(found)["dense"] == before
    assert total(found)["achieved"] == sum(row["cost"] for row in found.rows[1:]) <= total(found)["asked"]
    assert total(found)["asked"] == floor(keep * before)


@pytest.mark.parametrize("of", ["bits", "parameters", "macs", "bytes_per_token"])
def test_each_unit_is_met_in_that_unit(llama, of):
    found = allocate(llama, one_rule(Svd(keep=1.0)), Budget(keep=0.5, of=of, by="spectrum"))
    rows = compress(load_model(llama), found.plan)
    dense = {r["site"]: r["dense_cost"] for r in found.rows[1:]}
    words = {"bits": ("bits", 1), "parameters": ("parameters", 1), "macs": ("macs_per_token", 1)}
    key, unit = words.get(of, ("bits", 8))
    after = sum(row[key] // unit for row in rows)
    after += sum(dense[name] for name in dense.keys() - {row["site"] for row in rows})
    assert after == total(found)["achieved"] <= total(found)["asked"] == sum(dense.values()) // 2
    errors = {row["site"]: row["error"] for row in found.rows[1:]}
    for row in rows:  # what was foretold is what the fit then has
        assert errors[row["site"]] == pytest.approx(row["relative_error"] ** 2, rel=1e-3, abs=1e-9)


def test_marginal_errors_beat_equal_shares_where_layers_differ(llama):
    """With any budget that leaves room for the dearest step, the greedy sum is the smallest there is; see allocate."""
    plan = one_rule(SvdLlm(keep=1.0))
    even = allocate(llama, plan, Budget(keep=0.5), BATCHES)
    greedy = allocate(llama, plan, Budget(keep=0.5, by="spectrum"), BATCHES)
    errors = {}
    for name, found in (("even", even), ("greedy", greedy)):
        model, survey = load_model(llama), None
        survey = Survey(model, plan, Home(), of="bits", errors="spectrum")
        survey.run(Calibration(BATCHES, "dense"))
        by_size = {s: {o.size: o.error for o in item.options.options} for s, item in survey.found.items()}
        errors[name] = sum(by_size[row["site"]].get(row["size"], 0.0) for row in found.rows[1:])
    assert errors["greedy"] == pytest.approx(total(greedy)["error"])
    assert errors["greedy"] < 0.8 * errors["even"]
    assert total(greedy)["achieved"] >= total(even)["achieved"]


@pytest.mark.parametrize("method", [Svd(keep=1.0), SvdLlm(keep=1.0, update=True), Mixt(num_branches=1)], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_from_the_disk_block_by_block_the_same_as_in_memory(tmp_path, family, method):
    make(family).save_pretrained(tmp_path)
    found = allocate(tmp_path, one_rule(method), Budget(keep=0.6, by="greedy", levels=3), BATCHES)
    model = load_model(tmp_path)
    survey = Survey(model, one_rule(method), Home(), of="bits", errors="fits", levels=3, with_inputs=True)
    survey.run(Calibration(BATCHES, "dense"))
    rows = {row["site"]: row for row in found.rows[1:]}
    assert rows.keys() == survey.found.keys()
    for name, item in survey.found.items():
        by_size = {option.size: option for option in item.options.options}
        assert rows[name]["error"] == by_size[rows[name]["size"]].error
        assert rows[name]["cost"] == by_size[rows[name]["size"]].cost


def test_nothing_is_written_beside_or_into_the_source(llama):
    before = {file: file.stat().st_mtime_ns for file in llama.parent.rglob("*")}
    allocate(llama, one_rule(SvdLlm(keep=1.0)), Budget(keep=0.5, by="spectrum"), BATCHES)
    assert {file: file.stat().st_mtime_ns for file in llama.parent.rglob("*")} == before


@pytest.mark.parametrize("measure", ["kl", "loss", "angle"])
def test_a_site_that_does_not_matter_gets_the_least(tmp_path, measure):
    """Behind a zero o projection nothing of q, k and v is seen, whatever becomes of them."""
    model = make("llama")
    with torch.no_grad():
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.1.{part}").weight.zero_()
    model.save_pretrained(tmp_path)
    budget = Budget(keep=0.5, by="sensitivity", measure=measure)
    found = allocate(tmp_path, one_rule(Svd(keep=1.0)), budget, BATCHES)
    rows = {row["site"]: row for row in found.rows[1:]}
    idle = [row for name, row in rows.items() if "layers.1." in name and not name.endswith(("o_proj", "down_proj"))]
    assert all(row["importance"] == pytest.approx(1e-12, abs=1e-6) for row in idle)
    if measure == "loss":  # of a random model it may as well fall, at any site
        return
    shares = {row["site"]: row["cost"] / row["dense_cost"] for row in rows.values()}
    busy = [share for name, share in shares.items() if "layers.1." not in name]
    assert max(shares[row["site"]] for row in idle) < 0.15 < sum(busy) / len(busy)


def test_importance_is_the_divergence_for_each_unit_of_error(llama):
    """A budget of exactly rank 10 probes rank 10."""
    plan = one_rule(Svd(keep=1.0), sites=r".*1\.mlp\.up_proj")
    row = allocate(llama, plan, Budget(keep=10 * 80 / (32 * 48), by="sensitivity"), BATCHES).rows[1]
    model = load_model(llama)
    before = model(BATCHES[0]).logits.detach()
    changed = compress(model, allocate(llama, plan, Budget(keep=10 * 80 / (32 * 48))).plan)[0]
    after = model(BATCHES[0]).logits.detach()
    assert row["importance"] * changed["relative_error"] ** 2 == pytest.approx(
        float(divergences(before, after).mean()), rel=1e-4, abs=1e-7
    ), "up to log-probabilities in fp32"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
def test_trying_an_operator_leaves_the_model_as_it_was(family):
    model = make(family)
    before, names = model(BATCHES[0]).logits, [name for name, _ in model.named_modules()]
    for site in find_sites(model):
        method = DropBlocks() if site.kind == "block" else MeanOutput()
        survey = Survey(model, one_rule(method), Home(), of="bits", errors="none")
        if site.block == 1 and site.name in survey.chosen and site.kind != "experts":
            tried = DropBlocks().replace(site.module) if site.kind == "block" else Svd(keep=0.2).fit(site.weight, {})
            with torch.no_grad(), in_place(model, site, tried):
                assert not torch.equal(model(BATCHES[0]).logits, before)
    assert torch.equal(model(BATCHES[0]).logits, before)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_sensitivity_of_experts_is_measured_with_all_of_them(tmp_path, family):
    make(family).save_pretrained(tmp_path)
    plan = one_rule(Svd(keep=1.0), blocks="1", sites=r".*experts.*")
    found = allocate(tmp_path, plan, Budget(keep=0.5, by="sensitivity"), BATCHES)
    assert all(row["importance"] > 1e-9 for row in found.rows[1:]) and len(found.rows) == 3


def test_blocks_are_dropped_where_the_model_loses_least(tmp_path):
    model = make("llama")
    with torch.no_grad():
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.2.{part}").weight.zero_()
    model.save_pretrained(tmp_path)
    for measure in ("kl", "angle"):
        budget = Budget(keep=0.75, by="sensitivity", measure=measure)
        found = allocate(tmp_path, one_rule(DropBlocks()), budget, BATCHES)
        assert [rule.blocks for rule in found.plan.root] == ["2"]
        assert total(found)["achieved_keep"] == 0.75


def test_packed_weights_are_counted_as_they_are_stored(tmp_path):
    save_packed(tmp_path, "llama", (16, 16))
    packed = allocate(tmp_path / "packed", one_rule(Svd(keep=1.0)), Budget(keep=0.9, by="spectrum"))
    plain = allocate(tmp_path / "plain", one_rule(Svd(keep=1.0)), Budget(keep=0.9, by="spectrum"))
    state = load_file(tmp_path / "packed" / "model.safetensors")
    stored = {name: 8 * tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    for row in packed.rows[1:]:
        name = f"{row['site']}.weight"
        assert row["dense_cost"] == stored[name] + stored[f"{name}_scale_inv"]
    assert total(packed)["asked"] < 0.7 * total(plain)["asked"]
    assert total(packed)["achieved"] <= total(packed)["asked"]
    measured = allocate(tmp_path / "packed", one_rule(ZeroMethod()), Budget(keep=0.9, by="sensitivity"), BATCHES)
    assert total(measured)["dense"] == total(packed)["dense"]


def test_of_the_whole_model_what_is_outside_the_sites_is_paid_first(llama):
    plan = one_rule(Svd(keep=1.0), blocks="0-1")
    found = allocate(llama, plan, Budget(keep=0.8, over="model", by="spectrum"))
    stored = sum(8 * t.numel() * t.element_size() for t in load_file(llama / "model.safetensors").values())
    assert total(found)["dense"] == stored and total(found)["achieved"] <= floor(0.8 * stored)
    assert total(found)["achieved"] > 0.79 * stored


@pytest.mark.parametrize("of", ["bits", "parameters", "macs"])
@pytest.mark.parametrize("method", [FlatLlm(keep=1.0), Sola(keep=1.0)], ids=lambda method: method.name)
def test_methods_that_change_layers_together_get_one_keep(llama, method, of):
    found = allocate(llama, one_rule(method), Budget(keep=0.6, of=of))
    assert 0.5 < total(found)["achieved_keep"] <= 0.6
    rows = {row["site"]: row for row in compress(load_model(llama), found.plan, BATCHES)}
    after = sum(rows[row["site"]][{"macs": "macs_per_token"}.get(of, of)] for row in found.rows[1:])
    assert after <= total(found)["asked"] if method.name == "sola" else after == total(found)["achieved"]
    with pytest.raises(ValueError, match=r"cannot be met; the smallest possible is 0\.\d+, the largest 1") as error:
        allocate(llama, one_rule(method), Budget(keep=0.001, of=of))
    smallest = float(str(error.value).split("smallest possible is ")[1].split(",")[0])
    allocate(llama, one_rule(method), Budget(keep=smallest, of=of))
    with pytest.raises(ValueError, match="divides its keep within each block by itself"):
        allocate(llama, one_rule(method), Budget(keep=0.5, by="sensitivity"), BATCHES)
    mixed = Plan((Rule(method=method, blocks="0"), Rule(method=Svd(keep=1.0))))
    with pytest.raises(ValueError, match="cannot share one budget"):
        allocate(llama, mixed, Budget(keep=0.5))


def test_all_of_it_leaves_the_model_dense(llama):
    for by in ("uniform", "spectrum"):
        assert allocate(llama, one_rule(Svd(keep=1.0)), Budget(keep=1, by=by)).plan.root == ()
