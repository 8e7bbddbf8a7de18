"""One layer in the place of several blocks: it reaches the known optimum, and is saved and counted as what it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plans import plan_of
from tensormix.compression import compress
from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.methods import Streamline, Svd
from tensormix.methods.base import HiddenStates
from tensormix.models import load_model
from tensormix.operators import Bypass, ResidualMLP, build
from tensormix.recipe import Recipe
from tensormix.run.check import check
from tensormix.sites import blocks, macs_per_token
from tensormix.storage.bits import stored_bits
from zoo import MOE, ZOO, make, token_ids

BATCHES = [token_ids(seed=1), token_ids(seed=2, length=7)]
WIDTH = 8
STREAMED = ("llama", "gemma3", "gptj", "mixtral", "gpt_oss", "deepseek_v3")  # every way of storing and of returning


class Linear(nn.Module):
    """h + W h: any number of these is one of these."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.proj.weight = nn.Parameter(size * torch.randn(WIDTH, WIDTH))

    def forward(self, hidden, **_):
        return hidden + self.proj(hidden)


class LinearModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(61, WIDTH)
        self.layers = nn.ModuleList(Linear(size) for size in (1.0, 0.1, 0.2, 1.0))

    def forward(self, ids, **_):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def streamlined(blocks="all", **settings) -> dict:
    return {"method": Streamline(**settings), "blocks": blocks}


def ends(model, start, count):
    """The hidden states (N, D) of all tokens before and after the blocks."""
    states = []
    for ids in BATCHES:
        hidden = model.embed(ids)
        for layer in model.layers[:start]:
            hidden = layer(hidden)
        after = hidden
        for layer in model.layers[start : start + count]:
            after = layer(after)
        states.append((hidden.flatten(0, 1), after.flatten(0, 1)))
    return (torch.cat(parts).double() for parts in zip(*states, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("width", [2, 6, 16, 20])
def test_a_linear_window_is_matched_at_the_optimum_of_every_rank(width):
    """With 2 D units exactly, with fewer at the reduced rank optimum: the singular values of change that are cut."""
    model = LinearModel()
    before, after = ends(model, 1, 2)
    (row, _) = compress(model, plan_of(streamlined(count=2, replacement="mlp", width=width, steps=0)), BATCHES)
    assert row["block"] == 1 and row["window"] == [1, 2] and row["operator"] == "ResidualMLP"
    optimum = torch.linalg.svdvals(after - before)[width // 2 :].square().sum() / after.numel()
    assert row["mse"] == pytest.approx(float(optimum), rel=1e-4, abs=1e-12)
    assert row["mse_dropped"] == pytest.approx(float((after - before).square().mean()), rel=1e-5)
    got = model.layers[1](before.float())
    assert float((got - after).square().mean()) == pytest.approx(row["mse"], rel=1e-4, abs=1e-11)


def test_a_layer_of_the_same_kind_learns_the_product_of_two():
    model = LinearModel()
    first, second = (layer.proj.weight.detach().clone() for layer in model.layers[1:3])
    (row, dropped) = compress(model, plan_of(streamlined(count=2, steps=800, learning_rate=3e-2)), BATCHES)
    assert type(model.layers[1]) is Linear and isinstance(model.layers[2], Bypass)
    assert row["mse"] < 1e-4 * row["mse_dropped"] and "mse" not in dropped
    product = first + second + second @ first
    assert (model.layers[1].proj.weight - product).norm() < 0.02 * product.norm()
    assert (row["parameters"], row["bits"], dropped["parameters"], dropped["bits"]) == (64, 64 * 32, 0, 0)


def test_training_starts_at_the_optimum_and_never_makes_it_worse():
    """A learning rate that destroys everything leaves the closed form."""
    trained = {"steps": 30, "learning_rate": 10.0}
    rules = [plan_of(streamlined(count=2, replacement="mlp", width=6, **more)) for more in ({"steps": 0}, trained)]
    start, after = (compress(LinearModel(), each, BATCHES)[0]["mse"] for each in rules)
    assert after == start


def test_fewer_tokens_than_features():
    model = LinearModel()
    (row, _) = compress(model, plan_of(streamlined(count=2, replacement="mlp", width=16, steps=0)), [token_ids(1, 3)])
    assert row["mse"] < 1e-9 * row["mse_dropped"]


@pytest.mark.parametrize("family", [*ZOO, *MOE])
def test_it_beats_dropping_and_streams_to_the_bit(tmp_path, family):
    """Trained layers and mlps in turn over the families; the other rule sees what the replacement passes on."""
    number = [*ZOO, *MOE].index(family)
    kind = {"replacement": "layer"} if number % 2 else {"replacement": "mlp", "width": 16}
    rules = plan_of(streamlined("1-3", count=2, steps=10, **kind), {"method": Svd(keep=0.5), "blocks": "0"})
    model = make(family)
    model.save_pretrained(tmp_path / "dense")
    rows = compress(model, rules, BATCHES)
    (row,) = (row for row in rows if "mse" in row)
    assert row["mse"] < row["mse_dropped"]
    if family not in STREAMED:
        return
    streamed = compress_checkpoint(tmp_path / "dense", tmp_path / "out", rules, BATCHES, spill=number % 3 == 0)
    assert [{**r, "seconds": 0} for r in streamed] == [{**r, "seconds": 0} for r in rows]
    again = load_model(tmp_path / "out")
    assert torch.equal(again(token_ids(seed=5)).logits, model(token_ids(seed=5)).logits)
    replaced = blocks(again)[row["block"]]
    assert row["bits"] == stored_bits(replaced) and row["macs_per_token"] == macs_per_token(replaced)
    generated = again.generate(token_ids(1), max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, again.generate(token_ids(1), max_new_tokens=3, do_sample=False, use_cache=False))


def test_in_bfloat16_from_a_saved_model_and_back(tmp_path):
    make("qwen2").bfloat16().save_pretrained(tmp_path / "dense")
    rules = plan_of(streamlined(count=2, steps=5))
    model = load_model(tmp_path / "dense")
    rows = compress(model, rules, BATCHES)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert rows[0]["mse"] < rows[0]["mse_dropped"]
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved")(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("kind", [{}, {"replacement": "layer"}], ids=str)
def test_a_stopped_walk_goes_on_behind_the_replacement(tmp_path, kind):
    make("llama").save_pretrained(tmp_path / "dense")
    rules = plan_of(streamlined("0-1", count=2, steps=5, **kind), {"method": Svd(keep=0.5)}, {"method": Svd(keep=0.5)})

    def stop(done, total, name):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", rules, BATCHES, stop)
    rows = compress_checkpoint(tmp_path / "dense", tmp_path / "out", rules, BATCHES)
    whole = compress_checkpoint(tmp_path / "dense", tmp_path / "whole", rules, BATCHES)
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in whole]
    one, other = (load_model(tmp_path / name).state_dict() for name in ("out", "whole"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_the_same_seed_the_same_layer_another_seed_another():
    def first(seed):
        model = LinearModel()
        compress(model, plan_of(streamlined(count=2, steps=5, seed=seed)), BATCHES)
        return model.layers[1].proj.weight

    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(5))


def test_a_check_counts_it_without_weights(tiny, tmp_path):
    method = "{name: streamline, count: 2, replacement: mlp, width: 10}"
    text = f"model: {tiny}\nplan: [{{method: {method}}}]\ncalibration: {{text: {{exam: true}}}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    result = check(Recipe.load(tmp_path / "recipe.yaml"))
    assert [(row["block"], row["operator"], row["parameters"]) for row in result["sites"]] == [
        (2, "ResidualMLP", 2 * 32 * 10), (3, "Bypass", 0),
    ]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(text.replace(", replacement: mlp, width: 10", ""))
    layer = check(Recipe.load(tmp_path / "recipe.yaml"))["sites"][0]
    assert layer["parameters"] == layer["dense_parameters"] > 0


def test_the_operator_comes_back_from_its_spec():
    mlp = ResidualMLP(6, 4, returns="tuple", attention_type="full_attention", sentinel="norm.weight")
    again = build(mlp.spec)
    assert again.spec == mlp.spec and again.state_dict().keys() == mlp.state_dict().keys()
    assert (mlp.num_params, mlp.num_bits, mlp.macs_per_token) == (48, 48 * 32, 48)
    with pytest.raises(ValueError, match="hidden_size and width must be at least 1, got 6, 0"):
        ResidualMLP(6, 0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"count": 2, "replacement": "mlp"}, "width is the number of hidden units of replacement 'mlp'"),
        ({"count": 2, "width": 8}, "give both or none"),
        ({"count": 2, "replacement": "mlp", "width": 7}, "multiple of 2"),
        ({}, "count\n  Field required"),
    ],
)
def test_settings_that_cannot_be(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Streamline(**settings)


def test_states_that_are_not_finite_change_nothing():
    model = LinearModel()
    with torch.no_grad():
        model.layers[2].proj.weight.mul_(1e30)
    method = Streamline(count=1)
    sentence = "Streamline: hidden states hold NaN or infinite values; nothing was changed"
    with pytest.raises(ValueError, match=sentence):
        states = [torch.ones(1, 2, 8)], [torch.full((1, 2, 8), torch.inf)]
        method.fit([model.layers[0]], HiddenStates([lambda block, h: block(h)], *states))
