"""What a budget cannot do is said in one sentence."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from budget_plans import BATCHES, save_varied_llama
from plans import one_rule
from tensormix.allocation import WAYS, allocate
from tensormix.methods import DobiSvd, Mixt, Rtn, Svd, SvdLlm
from tensormix.settings import Budget


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_varied_llama(tmp_path_factory.mktemp("llama"))


def test_a_budget_that_cannot_be_met_names_one_that_can(llama):
    for by, keep in (("spectrum", 0.01), ("uniform", 0.01), ("uniform", 0.05)):
        with pytest.raises(ValueError, match=r"cannot be met; the smallest possible is 0\.\d+, the largest 1") as error:
            allocate(llama, one_rule(Svd(keep=1.0)), Budget(keep=keep, by=by))
        smallest = float(str(error.value).split("smallest possible is ")[1].split(",")[0])
        allocate(llama, one_rule(Svd(keep=1.0)), Budget(keep=smallest, by=by))
        with pytest.raises(ValueError, match="cannot be met"):
            allocate(llama, one_rule(Svd(keep=1.0)), Budget(keep=smallest - 2e-4, by=by))


@pytest.mark.parametrize("method", [Svd(keep=1.0), Mixt(num_branches=1), SvdLlm(keep=1.0)])
def test_a_broken_weight_is_named(llama, tmp_path, method):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.2.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^model\.layers\.2\.mlp\.up_proj: the weight holds NaN"):
        allocate(tmp_path, one_rule(method), Budget(keep=0.5, by="greedy"), BATCHES)


@pytest.mark.parametrize("method", [Rtn(bits=8, group=16), SvdLlm(keep=1.0)])
def test_inputs_that_say_nothing_are_named(llama, tmp_path, method):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.post_attention_layernorm.weight"].zero_()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.gate_proj: .*all zero"):
        allocate(tmp_path, one_rule(method), Budget(keep=0.5, by="greedy", levels=2), BATCHES)


def test_a_way_that_does_not_fit_the_method_is_refused(llama):
    with pytest.raises(ValueError, match=r"q_proj: the error of rtn cannot be told from singular values; divide the"):
        allocate(llama, one_rule(Rtn(bits=8)), Budget(keep=0.5, by="spectrum"))
    with pytest.raises(ValueError, match="sensitivity is measured on calibration text, and there is none"):
        allocate(llama, one_rule(Svd(keep=1.0)), Budget(keep=0.5, by="sensitivity"))
    with pytest.raises(ValueError, match="svd_llm needs calibration batches"):
        allocate(llama, one_rule(SvdLlm(keep=1.0)), Budget(keep=0.5, by="spectrum"))
    with pytest.raises(ValueError, match="bytes_per_token is counted over sites only"):
        allocate(llama, one_rule(Svd(keep=1.0)), Budget(keep=0.5, of="bytes_per_token", over="model"))


def test_every_way_of_the_settings_is_in_the_table():
    assert set(WAYS) == set(Budget.model_json_schema()["properties"]["by"]["enum"])


@pytest.mark.parametrize(
    ("plan", "budget", "sentence"),
    [
        (one_rule(Svd(keep=1.0)), {}, "divides the ranks of dobi_svd, and the plan has svd"),
        (one_rule(DobiSvd(rank=1, storage="remapped")), {"of": "parameters"}, "with 'remapped' only of 'bits'"),
    ],
)
def test_what_cannot_be_learned(llama, plan, budget, sentence):
    with pytest.raises(ValueError, match=sentence):
        allocate(llama, plan, Budget(keep=0.5, by="learned", **budget), BATCHES)
