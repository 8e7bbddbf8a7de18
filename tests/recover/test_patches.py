"""Patches of every shape begin as nothing, on compressed and on dense layers; they stay, or are merged and gone."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from recovery_rows import steps_of
from tensormix.compression import compress
from tensormix.models import load_model, load_tokenizer
from tensormix.operators import Chain, Dense, LowRank, StructuredLinear, Sum, TensorTrain
from tensormix.plan import Plan
from tensormix.recover import recover
from tensormix.recover.lora import Patches
from tensormix.recover.patches import make_patch
from tensormix.settings import Lora, Recover, Source
from tensormix.storage.bits import stored_bits
from zoo import logits, make

FORMS = ("low_rank", "loretta", "tt_lora")
MIXED = Plan.model_validate(
    [
        {"blocks": "1", "sites": ["up"], "method": {"name": "mixt", "num_branches": 3}},
        {"blocks": "2", "sites": ["q"], "method": {"name": "svd", "keep": 0.5}},
    ]
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def settings(**changes):
    base = {"text": [Source(exam=True)], "steps": 6, "batch_size": 4, "window": 48, "learning_rate": 1e-2}
    lora = Lora(**{"rank": 4, "alpha": 8} | changes.pop("lora", {}))
    return Recover(**base | {"parameters": "lora", "lora": lora} | changes)


def run(model, tiny, folder, wanted, **options):
    return steps_of(recover(model, load_tokenizer(str(tiny)), wanted, folder=folder, seed=0, **options))


def stir(patches, std=0.1):
    """As if they had learned."""
    with torch.no_grad():
        for number, parameter in enumerate(sorted(patches.parameters, key=lambda p: (p.numel(), p.shape))):
            parameter.add_(torch.randn(parameter.shape, generator=generator(number)), alpha=std)


# ---- a patch by itself


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("I", "O"), [(12, 18), (7, 5), (64, 24)])
def test_a_patch_begins_as_nothing_and_learns_from_its_first_step(form, I, O):
    patch = make_patch(I, O, Lora(form=form, rank=4), generator())
    operator = patch.operator
    assert (operator.in_features, operator.out_features) == (I, O)
    assert not operator.to_dense().any()
    x = torch.randn(32, I, generator=generator(1))
    (operator(x) * torch.randn(32, O, generator=generator(2))).sum().backward()
    gradients = [p.grad for p in operator.parameters()]
    assert sum(bool(g.any()) for g in gradients) == 1  # the one by which the outputs leave


@pytest.mark.parametrize("form", FORMS)
def test_the_matrix_by_which_inputs_enter_carries_the_scale(form):
    plain, scaled = (make_patch(24, 36, Lora(form=form, rank=4, alpha=a), generator()) for a in (4, 20))
    torch.testing.assert_close(scaled.scaled, 5 * plain.scaled)
    for one, other in zip(plain.others, scaled.others, strict=True):
        assert torch.equal(one, other)


def test_trains_are_those_of_the_papers():
    """TT-LoRA: cores of the factors of the inputs and of the outputs. LoRETTA: two factors, trains of small bonds."""
    train = make_patch(64, 24, Lora(form="tt_lora", rank=5, modes=2), generator()).operator
    assert isinstance(train, TensorTrain)
    assert [i * o for i, o in zip(train.in_modes, train.out_modes, strict=True)] == [8, 8, 4, 6]
    assert train.in_modes[2:] == [1, 1] and train.out_modes[:2] == [1, 1]
    assert train.ranks == [5, 5, 5] and train.num_params == 8 * 5 + 5 * 8 * 5 + 5 * 4 * 5 + 5 * 6
    pair = make_patch(64, 24, Lora(form="loretta", rank=8, bond=3, modes=2), generator()).operator
    assert isinstance(pair, Chain)
    left, right = pair.as_list()
    assert (left.in_features, right.out_features) == (8, 8)
    assert left.num_params == 8 * 3 + 3 * 4 * 3 + 3 * 6 and right.num_params == 8 * 3 + 3 * 8 * 3 + 3 * 8
    assert pair.num_params < make_patch(64, 24, Lora(rank=8), generator()).operator.num_params / 2


@pytest.mark.parametrize("form", ["loretta", "tt_lora"])
def test_a_train_is_drawn_as_large_as_the_factor_of_lora(form):
    """Entries of what the zero core multiplies have the variance of LoRA's A, 1 / 3 I, at scale 1."""
    squares = []
    for seed in range(200):
        patch = make_patch(27, 8, Lora(form=form, rank=4, alpha=4), generator(seed)).operator
        if form == "loretta":
            drawn = patch.as_list()[1].to_dense()
        else:
            with torch.no_grad():
                patch.core_5.fill_(0)[0, 0] = 1  # the last core takes the first of its bonds to its first output
            drawn = patch.to_dense()[::2]
        squares.append(float(drawn.detach().square().mean()))
    assert sum(squares) / len(squares) == pytest.approx(1 / (3 * 27), rel=0.2)


# ---- in a model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])  # biases and grouped queries; Conv1D
def test_a_dense_model_with_patches_starts_bit_equal_and_goes_back(form, family):
    model = make(family)
    names = {name for name, _ in model.named_parameters()}
    before, numbers = logits(model), sum(p.numel() for p in model.parameters())
    patches = Patches(model, Lora(form=form, rank=3, layers="all"), seed=0)
    assert len(patches.layers) >= 16
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert sum(p.numel() for p in model.parameters()) == numbers + sum(p.numel() for p in patches.parameters)
    patches.remove()
    assert {name for name, _ in model.named_parameters()} == names
    assert torch.equal(logits(model), before)
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_merged_into_dense_layers_they_leave_a_plain_model_that_computes_the_same(form, family, tmp_path):
    model = make(family)
    start, bits = logits(model), stored_bits(model)
    patches = Patches(model, Lora(form=form, rank=3, layers="all", merge=True), seed=0)
    stir(patches)
    before = logits(model)
    patches.merge()
    assert (before - start).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, StructuredLinear) for module in model.modules())
    assert stored_bits(model) == bits
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(load_model(str(tmp_path), dtype="float32")), logits(model))


@pytest.mark.parametrize("form", FORMS)
def test_the_patch_of_a_low_rank_layer_stands_beside_it_where_that_is_asked_for(form):
    model = make("qwen2")
    compress(model, MIXED)
    wanted = Lora(form=form, low_rank_layers="whole")
    patches = Patches(model, wanted, seed=0)
    assert not patches.take_turns and {len(layer.patches) for layer in patches.layers} == {1}
    patches.merge()
    added = [layer.patched for layer in patches.layers if isinstance(layer.module, LowRank)]
    assert len(added) == 1 and isinstance(added[0], Sum) and added[0] in list(model.modules())


@pytest.mark.parametrize("form", ["loretta", "tt_lora"])
def test_trained_they_are_counted_saved_and_loaded(form, tiny, tmp_path):
    model = load_model(str(tiny), dtype="float32")
    compress(model, MIXED)
    before, bits = copy.deepcopy(model), stored_bits(model)
    rows = run(model, tiny, tmp_path / "c", settings(steps=30, lora={"form": form, "layers": "all"}))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    sums = {name: m for name, m in model.named_modules() if isinstance(m, Sum)}
    assert len(sums) == 4 * 7 - 1  # each but the low-rank one, whose factors took theirs in
    assert stored_bits(model) == bits + sum(32 * term.terms[1].num_params for term in sums.values())
    for name, module in sums.items():
        assert isinstance(module.terms[0], Dense) == isinstance(before.get_submodule(name), nn.Linear)
        assert torch.equal(module.terms[0].to_dense(), dense_of(before.get_submodule(name)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(str(tmp_path / "saved"), dtype="float32")), logits(model))


def dense_of(module):
    return module.to_dense() if isinstance(module, StructuredLinear) else module.weight


def test_batches_add_up_to_one_step(tiny, tmp_path):
    """Eight batches of one window are a batch of eight."""
    found = []
    for number, sizes in enumerate(({"batch_size": 8}, {"batch_size": 1, "accumulation": 8})):
        for loss in ("lm", "kl"):
            model = load_model(str(tiny), dtype="float32")
            wanted = settings(steps=3, schedule="constant", warmup=0, loss=loss, lora={"layers": "all"}, **sizes)
            rows = run(model, tiny, tmp_path / f"{loss}{number}", wanted, teacher=str(tiny))
            losses = torch.tensor([row["loss"] for row in rows])
            found.append((logits(model), losses, [(row["tokens"], row["learning_rate"]) for row in rows]))
    for one, other in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one[1], other[1], rtol=1e-3, atol=1e-3)
        assert one[2] == other[2] == [(384 * step, 1e-2) for step in (1, 2, 3)]


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_what_was_frozen_meanwhile_can_be_trained_again(family):
    model = make(family)
    patches = Patches(model, Lora(layers="all"), seed=0)
    model.requires_grad_(False)
    patches.merge()
    assert all(p.requires_grad for m in model.modules() if isinstance(m, StructuredLinear) for p in m.parameters())


# ---- what cannot be


def test_what_is_not_dense_takes_no_patch_in():
    model = make("qwen2")
    compress(model, MIXED)
    before = logits(model)
    with pytest.raises(
        ValueError, match=r"merge needs a dense matrix in every layer, and model\.layers\.1\.mlp\.up_proj is a MixT"
    ):
        Patches(model, Lora(layers="all", merge=True), seed=0)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"bond": 3}, "bond belongs to the form loretta, and form is low_rank"),
        ({"form": "tt_lora", "bond": 3}, "bond belongs to the form loretta, and form is tt_lora"),
        ({"modes": 2}, "modes belongs to the form loretta or tt_lora"),
        ({"form": "dora"}, "'low_rank', 'loretta' or 'tt_lora'"),
    ],
)
def test_settings_of_another_form(lora, sentence):
    with pytest.raises(ValidationError, match=sentence):
        settings(lora=lora)
