"""Models whose removed neurons are not even written: the same logits, parameters and checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tensormix.hf  # noqa: F401
from tensormix.compression import compress
from tensormix.inference import faster
from tensormix.inference.faster import dense_where_faster
from tensormix.inference.zeros import Kept, without_zeros
from tensormix.operators import Dense, Placed
from tensormix.plan import Plan
from zoo import make, token_ids

IDS = token_ids(rows=2, length=12, seed=3)


def narrow(family, **settings):
    model = make(family).double().eval()
    plan = Plan.model_validate([{"blocks": "last 2", "method": {"name": "narrow", "keep": 0.4} | settings}])
    compress(model, plan, [token_ids(rows=4, length=16, seed=1)])
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt", "gpt2", "gptj", "gpt_neox"])
@pytest.mark.parametrize("width", [1.0, 0.75])
def test_the_logits_stay_and_only_the_neurons_that_stay_are_written(family, width):
    model = narrow(family, width=width)
    before, modules = logits(model), dict(model.named_modules())
    seen = []
    with without_zeros(model) as rows:
        assert [row["chosen"] for row in rows] == ["without", "without"]
        inside = [module for module in model.modules() if isinstance(module, Kept)]
        assert len(inside) == sum(len(row["layers"]) for row in rows)
        for name, module in model.named_modules():
            if isinstance(module, Kept):
                assert module.spec == modules[name].spec  # it is described as the layer that it stands for
        for module in inside:
            module.register_forward_hook(lambda _m, args, y: seen.append((args[0].shape[-1], y.shape[-1])))
        torch.testing.assert_close(logits(model), before, rtol=1e-11, atol=1e-11)
    neurons, of = rows[0]["neurons"], rows[0]["of"]
    assert neurons < 0.6 * of and len(seen) == len(inside)
    assert all(neurons in sizes and of not in sizes for sizes in seen)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)


def test_of_a_family_with_gate_and_up_in_one_layer_nothing_changes_and_the_rows_say_why():
    model = narrow("phi3")
    with without_zeros(model) as rows:
        assert [(row["chosen"], row["layers"]) for row in rows] == [("as it is", ["down_proj"])] * 2
        assert {row["why"] for row in rows} == {"gate and up are one layer, or stand in another module"}


def test_what_is_saved_inside_is_what_is_saved_outside(tmp_path):
    model = narrow("qwen2").float()
    model.save_pretrained(tmp_path / "outside")
    with without_zeros(model):
        model.save_pretrained(tmp_path / "inside")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "inside" / name).read_bytes() == (tmp_path / "outside" / name).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "inside").eval()
    assert torch.equal(logits(again), logits(model))


def test_what_is_trained_inside_is_trained():
    model, other = narrow("gpt2"), narrow("gpt2")
    names = [name for name, _ in model.named_parameters()]
    with without_zeros(model):
        assert [name for name, _ in model.named_parameters()] == names
        one_step(model)
    one_step(other)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)


def one_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()


class Mlp(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up_proj, self.down_proj = up, down


def placed(inputs, outputs, kept, **groups):
    torch.manual_seed(0)
    return Placed.from_dense(torch.randn(outputs, inputs), inner_type=Dense, kept=kept, **groups)


def test_what_the_layers_read_and_put_out_elsewhere_stays_in_groups():
    up, down = placed(8, 12, (6, 4), in_groups=2), placed(12, 8, (4, 6), out_groups=2)
    model, x = nn.ModuleDict({"mlp": Mlp(up, down)}), torch.randn(3, 8)
    before = down(up(x))
    with without_zeros(model):
        inside = model["mlp"]
        torch.testing.assert_close(inside.down_proj(inside.up_proj(x)), before)
        assert inside.up_proj(x).shape == (3, 6)


@pytest.mark.parametrize(
    ("mlp", "why"),
    [
        (lambda: Mlp(placed(8, 12, (6, 8)), placed(12, 8, (8, 4))), "the layers keep different neurons"),
        (lambda: Mlp(nn.Linear(8, 12), placed(12, 8, (8, 6))), "up_proj has all neurons"),
        (
            lambda: Mlp(placed(8, 12, (6, 8), out_groups=2), placed(12, 8, (8, 6), in_groups=2)),
            "the neurons are in groups",
        ),
    ],
)
def test_layers_that_cannot_do_without_are_left_and_named(mlp, why):
    model = nn.ModuleDict({"mlp": mlp()})
    with without_zeros(model) as rows:
        assert [(row["module"], row["chosen"], row["why"]) for row in rows] == [("mlp", "as it is", why)]
        assert not any(isinstance(module, Kept) for module in model.modules())


def test_layers_that_are_watched_are_left():
    model = nn.ModuleDict({"mlp": Mlp(placed(8, 12, (6, 8)), placed(12, 8, (8, 6)))})
    model["mlp"].up_proj.register_forward_hook(lambda *_: None)
    with without_zeros(model) as rows:
        assert rows[0]["why"] == "hooks or a forward of its own would be passed over"


def test_a_layer_with_a_forward_of_its_own_is_left():
    """As accelerate gives one to every layer of a model that it places on several devices."""
    up = placed(8, 12, (6, 8))
    model, theirs = nn.ModuleDict({"mlp": Mlp(up, placed(12, 8, (8, 6)))}), up.forward
    up.forward = lambda x: theirs(x) + 1
    with without_zeros(model) as rows:
        assert model["mlp"].up_proj is up
        assert rows[0]["why"] == "hooks or a forward of its own would be passed over"


def test_the_neurons_that_stay_have_their_biases_in_the_dense_form_too(monkeypatch):
    monkeypatch.setattr(faster, "milliseconds", lambda *_: (2.0, 1.0))
    model = narrow("gpt2")
    before = logits(model)
    with without_zeros(model), dense_where_faster(model, num_tokens=3) as rows:
        assert {row["chosen"] for row in rows} == {"dense"}
        torch.testing.assert_close(logits(model), before, rtol=1e-11, atol=1e-11)
    assert torch.equal(logits(model), before)


def test_inside_itself_it_changes_nothing_and_says_so():
    model = narrow("llama")
    with without_zeros(model):
        modules = list(model.modules())
        with without_zeros(model) as rows:
            assert {row["why"] for row in rows} == {"they do without already"}
        assert list(model.modules()) == modules


def test_a_bias_that_was_put_there_inside_stays():
    model = nn.ModuleDict({"mlp": Mlp(placed(8, 12, (6, 8)), placed(12, 8, (8, 6)))})
    model["mlp"].up_proj.bias = nn.Parameter(torch.zeros(12))
    loaded = {name: value + 1 for name, value in model.state_dict().items()}
    with without_zeros(model):
        model.load_state_dict(loaded, assign=True)
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_an_error_inside_leaves_the_model_as_it_was_and_a_dense_model_has_no_rows():
    model = narrow("llama")
    before = list(model.modules())
    with pytest.raises(RuntimeError, match="mine"), without_zeros(model):
        raise RuntimeError("mine")
    assert list(model.modules()) == before
    with without_zeros(make("llama")) as rows:
        assert rows == []
