"""Low-rank repair starts at the compressed model, changes nothing but patches, and leaves factors their size."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from expert_models import UP, low_rank, site_at
from recovery_rows import steps_of
from tensormix.compression import compress
from tensormix.models import load_model, load_tokenizer
from tensormix.operators import LowRank, MixT, Quantized, StructuredLinear, Sum
from tensormix.plan import Plan
from tensormix.recover import recover
from tensormix.recover.lora import Patches
from tensormix.recover.watch import last_whole_checkpoint
from tensormix.settings import Lora, Recover, Source
from tensormix.sites import install
from tensormix.storage.bits import stored_bits
from zoo import MOE, logits, make

MIXT, THIN, SMALL = (f"model.layers.{name}_proj" for name in ("1.mlp.up", "2.self_attn.q", "3.mlp.down"))
PLAN = Plan.model_validate(
    [
        {"blocks": "1", "sites": ["up"], "method": {"name": "mixt", "num_branches": 3}},
        {"blocks": "2", "sites": ["q"], "method": {"name": "svd", "keep": 0.5}},
        {"blocks": "3", "sites": ["down"], "method": {"name": "rtn", "bits": 4}},
    ]
)


def settings(**changes):
    base = {"text": [Source(exam=True)], "steps": 6, "batch_size": 4, "window": 48, "learning_rate": 1e-2}
    return Recover(**base | {"parameters": "lora", "lora": Lora(rank=2, alpha=4)} | changes)


def compressed(model, plan=PLAN):
    compress(model, plan)
    return model


def load(tiny, dtype="float32"):
    return compressed(load_model(str(tiny), dtype=dtype))


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def run(model, tiny, folder, wanted, **options):
    return steps_of(recover(model, load_tokenizer(str(tiny)), wanted, folder=folder, seed=0, **options))


@pytest.fixture(scope="module")
def repaired(tiny, tmp_path_factory):
    """A model before and after, and the rows."""
    model = load(tiny)
    before = copy.deepcopy(model)
    rows = run(model, tiny, tmp_path_factory.mktemp("lora") / "c", settings(steps=40))
    return before, model, rows


# ---- patches by themselves


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])  # biases and grouped queries; Conv1D
def test_a_patched_model_starts_bit_equal(family):
    sites = {"qwen2": ["q", "k", "down"], "gpt2": ["qkv", "down"]}[family]
    rules = [
        {"blocks": "0", "sites": sites, "method": {"name": "svd", "keep": 0.6}},
        {"blocks": "1", "sites": sites, "method": {"name": "mixt", "num_branches": 2}},
        {"blocks": "2", "sites": sites, "method": {"name": "zero"}},
        {"blocks": "3", "sites": sites, "method": {"name": "rtn", "bits": 8}},
    ]
    model = compressed(make(family), Plan.model_validate(rules))
    before, kept = logits(model), state(model)
    patches = Patches(model, Lora(rank=3), seed=0)
    assert torch.equal(logits(model), before)
    assert len(patches.layers) == 4 * len(sites)
    assert all(
        (p.operator.left == 0).all() and (p.operator.right != 0).all() for e in patches.layers for p in e.patches
    )
    patches.remove()
    assert state(model).keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in state(model).items())


def test_merged_factors_keep_their_size_and_compute_what_the_patches_did():
    model = compressed(make("qwen2"), Plan.model_validate([{"method": {"name": "svd", "keep": 0.6}}]))
    specs = {name: module.spec for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    bits, start = stored_bits(model), logits(model)
    patches = Patches(model, Lora(rank=2), seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(patch.operator.left for e in patches.layers for patch in e.patches):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    assert stored_bits(model) > bits
    before = logits(model)
    patches.merge()
    assert (before - start).abs().max() > 0.05
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    after = {name: module.spec for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    assert after == specs and specs
    assert all(spec["operator"] == "LowRank" for spec in specs.values())
    assert stored_bits(model) == bits


def test_it_makes_the_steps_of_lora():
    """alpha / rank as part of a factor, with a rate as much larger, against the formula itself under Adam."""
    generator = torch.Generator().manual_seed(0)
    weight, target, x = (torch.randn(*shape, generator=generator) for shape in ((6, 8), (6, 8), (64, 8)))
    model = nn.Module()
    model.config, model.layer = SimpleNamespace(), MixT.from_dense(weight, num_branches=2)
    frozen = model.layer.to_dense().detach()
    patches = Patches(model, Lora(rank=2, alpha=6), seed=0)
    patch = patches.layers[0].patches[0].operator
    B, A = (nn.Parameter(value.detach().clone()) for value in (patch.left, patch.right / 3))
    ours = torch.optim.AdamW(patches.groups(0.02), weight_decay=0.0)
    schedule = patches.schedule(ours, 0.1, 50, "cosine")
    lora = torch.optim.Adam([B, A], lr=1.0)
    for _ in range(50):
        lora.param_groups[0]["lr"] = schedule.get_last_lr()[0]
        for optimizer, made in ((ours, model.layer(x)), (lora, x @ (frozen + 3 * B @ A).T)):
            optimizer.zero_grad()
            (made - x @ target.T).square().mean().backward()
            optimizer.step()
        schedule.step()
    torch.testing.assert_close(model.layer.to_dense(), frozen + 3 * B @ A, rtol=1e-3, atol=1e-4)
    assert (model.layer.to_dense() - frozen).norm() > 1


@pytest.mark.parametrize(("steps", "halves"), [(20, [10, 10]), (7, [4, 3])])
def test_each_factor_gets_a_warm_up_and_a_cosine_to_zero(steps, halves):
    model = compressed(make("qwen2"), Plan.model_validate([{"sites": ["q"], "method": {"name": "svd", "keep": 0.6}}]))
    patches = Patches(model, Lora(rank=2, alpha=4), seed=0)
    optimizer = torch.optim.AdamW(patches.groups(0.1))
    schedule = patches.schedule(optimizer, 0.5, steps, "cosine")
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    for half in (rates[: halves[0]], rates[halves[0] :]):
        left, right = ([pair[group] for pair in half] for group in (0, 1))
        assert right == pytest.approx([2 * rate for rate in left])
        peak = math.ceil(0.5 * len(half))
        assert left[0] == 0 and left[peak] == pytest.approx(0.1)
        assert left[: peak + 1] == sorted(left[: peak + 1]) and left[peak:] == sorted(left[peak:], reverse=True)


# ---- training


def test_only_patches_learn_and_the_loss_falls(repaired):
    before, model, rows = repaired
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    for name, kind in ((MIXT, MixT), (SMALL, Quantized)):
        operator = model.get_submodule(name)
        assert isinstance(operator, Sum)
        frozen, patch = operator.terms
        assert isinstance(frozen, kind) and isinstance(patch, LowRank) and patch.rank == 2
        assert all(torch.equal(v, before.get_submodule(name).state_dict()[k]) for k, v in frozen.state_dict().items())
        assert torch.linalg.matrix_rank(patch.left) == 2
    old, new = state(before), state(model)
    rest = [name for name in new if not name.startswith((MIXT, THIN, SMALL))]
    assert len(rest) > 20
    assert all(torch.equal(old[name], new[name]) for name in rest)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_both_factors_of_a_thin_layer_are_changed_by_the_rank_of_a_patch(repaired):
    before, model, _ = repaired
    old, new = before.get_submodule(THIN), model.get_submodule(THIN)
    assert isinstance(new, LowRank) and new.spec == old.spec and new.rank > 4
    for one, other in ((old.left, new.left), (old.right, new.right)):
        values = torch.linalg.svdvals((other - one).detach())
        assert values[1] > 1e-4 and values[2] < 1e-5 * values[0]


def test_what_stays_is_counted_and_survives_saving(repaired, tmp_path):
    before, model, _ = repaired
    added = 2 * (32 + 64) * 2 * 32  # rank 2, two layers between 32 and 64 features, float32
    assert stored_bits(model) == stored_bits(before) + added
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dtype="float32")
    assert torch.equal(logits(again), logits(model))
    assert isinstance(again.get_submodule(MIXT), Sum)


def test_left_factors_learn_first_and_right_ones_then(tiny, tmp_path):
    model, seen = load(tiny), []

    def progress(_done, _total):
        factors = model.get_submodule(THIN).factors
        seen.append([factor.terms[1].left.detach().clone() for factor in factors])

    run(model, tiny, tmp_path / "c", settings(steps=5, warmup=0.0), progress=progress)
    left, right = zip(*seen, strict=True)
    assert all((value != 0).any() for value in left)
    assert [bool((value != 0).any()) for value in right] == [False, False, False, True, True]
    assert torch.equal(left[2], left[4]) and not torch.equal(left[1], left[2])


class Stopped(Exception):
    pass


def test_a_stopped_repair_ends_in_the_same_model_and_its_checkpoint_is_one(tiny, tmp_path):
    def repair(folder, stop_at=None):
        model, steps = load(tiny), []

        def progress(done, _total):
            steps.append(done)
            if done == stop_at:
                raise Stopped

        try:
            rows = run(model, tiny, folder, settings(steps=8, save_every=3), progress=progress)
        except Stopped:
            rows = None
        return model, rows, steps

    whole, rows, _ = repair(tmp_path / "whole")
    stopped, _, _ = repair(tmp_path / "cut", stop_at=5)
    untouched = state(load(tiny))
    assert all(torch.equal(value, untouched[name]) for name, value in state(stopped).items())
    found = last_whole_checkpoint(tmp_path / "cut")
    assert found.name == "checkpoint-3"
    assert isinstance(load_model(str(found)).get_submodule(MIXT), Sum)
    again, rows_again, steps = repair(tmp_path / "cut")
    assert steps == [4, 5, 6, 7, 8]
    assert all(torch.equal(value, state(again)[name]) for name, value in state(whole).items())
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["loss"]) for row in rows_again]


def test_a_bfloat16_model_learns_from_a_teacher_and_stays_one(tiny, tmp_path):
    model = load(tiny, "bfloat16")
    wanted = settings(loss="kl", steps=3, distill={"top_k": 8, "task_steps": 1}, recompute=True)
    rows = run(model, tiny, tmp_path / "c", wanted, teacher=str(tiny))
    assert [row["phase"] for row in rows] == ["kl", "kl", "lm"]
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


# ---- what cannot be


def test_a_dense_model_has_nothing_to_patch(tiny, tmp_path):
    model = load_model(str(tiny), dtype="float32")
    with pytest.raises(ValueError, match="parameters 'lora' needs a structured operator in the model; it has none"):
        run(model, tiny, tmp_path / "c", settings())


def test_stacks_of_experts_are_refused_and_left_alone(tiny, tmp_path):
    model = make(next(iter(MOE)))
    install(model, UP, low_rank(site_at(model, UP), 4))
    before = logits(model)
    with pytest.raises(ValueError, match=f"patches single matrices, and {UP} is a stack of experts; train it with "):
        run(model, tiny, tmp_path / "c", settings())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss": "local_then_kl", "steps": 200}, "trains the patches of all blocks together; take the loss lm or kl"),
        ({"core_rate": "fan_in"}, "core_rate fan_in is of the matrices of operators, which parameters lora leaves"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"lora": {"alpha": 0}}, "greater than 0"),
    ],
)
def test_settings_that_do_not_go_together(changes, sentence):
    with pytest.raises(ValidationError, match=sentence):
        settings(**changes)
