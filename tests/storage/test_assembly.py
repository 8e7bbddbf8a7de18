"""Parameters made one at a time equal those of `from_pretrained`, and a checkpoint that does not fit is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensormix.models import load_model, skeleton
from tensormix.storage.assembly import Assembly
from tensormix.storage.formats import open_weights
from zoo import MOE, ZOO, make


def saved(tmp_path, family, change=None, **changes):
    make(family, **changes).save_pretrained(tmp_path)
    if change is not None:
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def assembled(folder, dtype=None) -> Assembly:
    return Assembly(skeleton(folder, dtype), open_weights(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*ZOO, *MOE])
def test_every_parameter_equals_the_one_that_is_loaded(tmp_path, family, dtype):
    folder = saved(tmp_path, family)
    expected = load_model(folder, dtype=dtype).state_dict()
    assembly = assembled(folder, dtype)
    made = {name: tensor for making in assembly.makings for name, tensor in assembly.make(making.targets[0]).items()}
    made.update({name: made[source] for name, source in assembly.tied.items() if name not in made})
    assert made.keys() == expected.keys() and assembly.unknown == []
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype and torch.equal(made[name], tensor), name


@pytest.mark.parametrize("family", MOE)
def test_every_tensor_on_disk_belongs_to_one_parameter(tmp_path, family):
    folder = saved(tmp_path, family)
    assembly = assembled(folder)
    sources = [name for making in assembly.makings for name in making.sources]
    assert sorted(sources) == sorted(open_weights(folder).entries)
    assert sum(assembly.bits_of(name) for making in assembly.makings for name in making.targets) == 8 * sum(
        entry.num_bytes for entry in open_weights(folder).entries.values()
    )


def test_a_checkpoint_without_the_prefix_of_the_head_model(tmp_path):
    """As the first releases of GPT-2 are: h.0.attn instead of transformer.h.0.attn."""

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    folder = saved(tmp_path, "gpt2", strip)
    expected = load_model(folder).state_dict()
    assembly = assembled(folder)
    for making in assembly.makings:
        for name, tensor in assembly.make(making.targets[0]).items():
            assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_tied_pair_stored_under_the_name_of_the_head(tmp_path, family):
    def rename(tensors):
        name = next(name for name in tensors if "embed_tokens" in name or "wte" in name)
        tensors["lm_head.weight"] = tensors.pop(name)

    folder = saved(tmp_path, family, rename)
    assembly = assembled(folder)
    expected = load_model(folder).state_dict()
    made = {name: tensor for making in assembly.makings for name, tensor in assembly.make(making.targets[0]).items()}
    made.update({name: made[source] for name, source in assembly.tied.items() if name not in made})
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)


def test_a_single_file_goes_before_an_index(tmp_path):
    """As it does for transformers."""
    saved(tmp_path / "other", "llama", seed=1)
    make("llama").save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "dense" / "model.safetensors")
    assembly, expected = assembled(tmp_path / "dense"), load_model(tmp_path / "dense").state_dict()
    assert all(torch.equal(assembly.make(name)[name], tensor) for name, tensor in expected.items())


def test_the_dtype_of_a_config_that_does_not_say_it(tmp_path):
    folder = saved(
        tmp_path,
        "llama",
        lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items() if "norm" not in n}),
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    assert skeleton(folder).dtype == load_model(folder).dtype == torch.bfloat16


def test_missing_tensors(tmp_path):
    folder = saved(tmp_path, "llama", lambda tensors: [tensors.pop(n) for n in list(tensors) if "2.mlp" in n])
    with pytest.raises(
        ValueError, match=r"lack model.layers.2.mlp.gate_proj.weight, .* which LlamaForCausalLM needs; the checkpoint"
    ):
        assembled(folder)


def test_shapes_that_contradict_the_config(tmp_path):
    folder = saved(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(
        ValueError,
        match=r"safetensors: model.layers.0.mlp.\w+.weight has the shape \(.*48.*\), but config.json implies \(.*40",
    ):
        assembled(folder)


def test_experts_that_contradict_the_config(tmp_path):
    folder = saved(tmp_path, "qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": 5}))
    with pytest.raises(ValueError, match=r"(is stacked from 4 experts, but config.json implies 5|has the shape \(4, )"):
        assembled(folder)


def test_the_shape_of_one_expert(tmp_path):
    def cut(tensors):
        name = next(name for name in tensors if "experts.2.up_proj" in name)
        tensors[name] = tensors[name][:-1].clone()

    folder = saved(tmp_path, "qwen3_moe", cut)
    with pytest.raises(ValueError, match=r"experts.2.up_proj.weight has the shape \(.*\), but config.json implies \("):
        assembled(folder)
