"""Checkpoints packed in fp8 or MXFP4 load as the plain models that they stand for, compressed or not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from packed_checkpoints import MXFP4, fp8_config, rewrite, save_packed
from tensormix.compression import compress
from tensormix.hf import StructuredConfig, operators_of
from tensormix.models import load_model, skeleton
from tensormix.plan import Plan
from zoo import logits

# Ragged blocks, one block for everything, and no blocks at all.
CASES = [
    ("llama", (128, 128)),
    ("llama", (7, 5)),
    ("qwen3", (8, 8)),
    ("qwen3", None),
    ("deepseek_v3", (7, 5)),
    ("qwen3_moe", (16, 16)),
    ("mixtral", (16, 16)),
    ("gpt_oss", None),
]
packs = pytest.mark.parametrize(("family", "block"), CASES, ids=[f"{family} {block}" for family, block in CASES])


def assert_same(model, expected):
    """Parameters and logits, to the bit; of copies, because sums round by where a tensor begins in its file."""
    tensors, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name
    assert torch.equal(logits(copy.deepcopy(model)), logits(copy.deepcopy(expected)))


@packs
def test_a_packed_checkpoint_is_the_plain_model(family, block, tmp_path):
    save_packed(tmp_path, family, block)
    model = load_model(tmp_path / "packed")
    assert_same(model, load_model(tmp_path / "plain"))
    assert model.dtype == torch.bfloat16 and not model.is_quantized
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize(("family", "block"), [("llama", (8, 8)), ("gpt_oss", None)])
def test_transformers_itself_makes_the_same(family, block, tmp_path):
    """Where it can: its rule for fp8 has no blocks that are cut at the edge."""
    save_packed(tmp_path, family, block)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    assert_same(load_model(tmp_path / "packed"), theirs)


@pytest.mark.parametrize(("family", "block"), [("llama", (7, 5)), ("deepseek_v3", (7, 5)), ("gpt_oss", None)])
def test_in_another_dtype_nothing_is_rounded_twice(family, block, tmp_path):
    save_packed(tmp_path, family, block)
    wide = load_model(tmp_path / "packed", dtype="float32")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert_same(wide.to(torch.bfloat16), load_model(tmp_path / "plain").to(torch.bfloat16))
    if family == "llama":
        stored = load_file(tmp_path / "packed" / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        exact = stored[name][0, 0].double() * stored[f"{name}_scale_inv"][0, 0].double()
        value = load_model(tmp_path / "packed", dtype="float32").get_parameter(name)[0, 0]
        assert value == exact.float() and value != value.bfloat16()


@pytest.mark.parametrize("folder", ["packed", "mixed"])
def test_without_a_dtype_in_the_config_it_is_bf16(folder, tmp_path):
    """Also where the first tensor on disk is fp8."""
    save_mixed(tmp_path, "llama", (7, 5), "mlp")
    path = tmp_path / folder / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / folder / "model.safetensors")
    codes = {name: tensor for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    rest = {name: tensor for name, tensor in tensors.items() if name not in codes}
    save_file(codes, tmp_path / folder / "model-1.safetensors", {"format": "pt"})
    save_file(rest, tmp_path / folder / "model-2.safetensors", {"format": "pt"})
    (tmp_path / folder / "model.safetensors").unlink()
    index = dict.fromkeys(codes, "model-1.safetensors") | dict.fromkeys(rest, "model-2.safetensors")
    (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    models = [load_model(tmp_path / folder), skeleton(tmp_path / folder)]
    if folder == "mixed":
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto"))
    for model in models:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_scales_of_activations_are_left_out(tmp_path):
    save_packed(tmp_path, "llama")
    folder = tmp_path / "packed"
    tensors = load_file(folder / "model.safetensors")
    scales = {f"{n.removesuffix('weight_scale_inv')}activation_scale" for n in tensors if n.endswith("_scale_inv")}
    rewrite(folder, tensors | {n: torch.tensor(9.0) for n in scales}, fp8_config() | {"activation_scheme": "static"})
    assert_same(load_model(folder), load_model(tmp_path / "plain"))


@packs
def test_saved_again_it_is_plain(family, block, tmp_path):
    plain = save_packed(tmp_path, family, block)
    load_model(tmp_path / "packed").save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in again.items())
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


@packs
def test_a_skeleton_is_that_of_the_plain_model(family, block, tmp_path):
    save_packed(tmp_path, family, block)
    bones, expected = skeleton(tmp_path / "packed"), load_model(tmp_path / "plain")
    shapes = {name: (p.shape, p.dtype) for name, p in expected.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in bones.named_parameters()} == shapes
    packed = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert bones.config.quantization_config["packed"] == packed


# Compressed checkpoints in which what was left alone is still packed.

SVD = {"name": "svd", "keep": 0.5}
PLANS = {
    "attention": [{"blocks": "1", "sites": ["o", "qkv"], "method": {"name": "mixt", "num_branches": 2}}],
    "mlp": [{"blocks": "1", "sites": ["up", "down"], "method": SVD}],
    "experts": [{"blocks": "2", "sites": r".*\.experts\.down", "method": {"name": "mixt", "num_branches": 2}}],
    "dropped": [{"blocks": "2", "method": {"name": "drop_blocks"}}, {"blocks": "0", "sites": ["o"], "method": SVD}],
}
MIXED = [("llama", (7, 5), "attention"), ("llama", (7, 5), "mlp"), ("llama", (7, 5), "dropped")]
MIXED += [("deepseek_v3", (7, 5), plan) for plan in ("attention", "experts")]
MIXED += [("gpt_oss", None, plan) for plan in ("attention", "experts", "dropped")]
mixed = pytest.mark.parametrize(("family", "block", "plan"), MIXED, ids=[f"{f} {plan}" for f, _, plan in MIXED])


def save_mixed(folder, family, block, plan):
    """The plain model compressed, and its checkpoint with everything else as the packed one has it, byte for byte."""
    save_packed(folder, family, block)
    model = load_model(folder / "plain")
    compress(model, Plan.model_validate(PLANS[plan]))
    model.save_pretrained(folder / "mixed")
    tensors = load_file(folder / "mixed" / "model.safetensors")
    # Experts of which a part is compressed are opened, and then all of them are stored in another way.
    gone = tuple(
        f"{name.partition('.experts')[0]}.experts." if ".experts" in name else f"{name}."
        for name in operators_of(model)
    )
    for name, tensor in load_file(folder / "packed" / "model.safetensors").items():
        if not name.startswith(gone):
            tensors[name] = tensor
            if name.endswith("_blocks"):
                del tensors[name.removesuffix("_blocks")]
    packed = json.loads((folder / "packed" / "config.json").read_text())["quantization_config"]
    config = StructuredConfig(operators=operators_of(model), packed=packed)
    rewrite(folder / "mixed", tensors, config.to_dict())
    return model


@mixed
def test_operators_beside_packed_tensors(family, block, plan, tmp_path):
    expected = save_mixed(tmp_path, family, block, plan)
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "mixed" / "model.safetensors").values()}
    assert dtypes & {torch.float8_e4m3fn, torch.uint8} and torch.bfloat16 in dtypes  # it is mixed
    model = load_model(tmp_path / "mixed")
    assert operators_of(model) == operators_of(expected) != {}
    assert_same(model, expected)


@mixed
def test_a_mixed_checkpoint_saved_again_is_plain(family, block, plan, tmp_path):
    expected = save_mixed(tmp_path, family, block, plan)
    load_model(tmp_path / "mixed").save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert sorted(config) == ["format_version", "operators", "quant_method"]
    expected.save_pretrained(tmp_path / "plain again")
    again, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "plain again"))
    assert again.keys() == wanted.keys()
    assert all(again[name].dtype == wanted[name].dtype for name in wanted if wanted[name].numel())
    assert_same(load_model(tmp_path / "again"), expected)


@pytest.mark.parametrize("disable_mmap", [False, True])
def test_transformers_loads_a_mixed_checkpoint_by_itself(disable_mmap, tmp_path):
    expected = save_mixed(tmp_path, "llama", (7, 5), "mlp")
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mixed", dtype="auto", output_loading_info=True, disable_mmap=disable_mmap
    )
    assert not any(report.values()), report
    assert_same(model, expected)


def test_a_skeleton_of_a_mixed_checkpoint_keeps_the_pack(tmp_path):
    save_mixed(tmp_path, "llama", (7, 5), "mlp")
    config = skeleton(tmp_path / "mixed").config.quantization_config
    assert config.packed == fp8_config((7, 5)) and len(config.operators) == 2


def test_the_config_without_a_pack_does_not_mention_it():
    assert "packed" not in StructuredConfig(operators={}).to_dict()
    assert StructuredConfig(packed=MXFP4).to_dict()["packed"] == MXFP4


# What is refused.


@pytest.mark.parametrize("read", [load_model, skeleton])
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "torchao", "compressed-tensors"])
def test_other_packs(read, method, tmp_path):
    save_packed(tmp_path, "llama")
    rewrite(tmp_path / "plain", load_file(tmp_path / "plain" / "model.safetensors"), {"quant_method": method})
    with pytest.raises(ValueError, match=f"packed as '{method}'; plain weights, 'fp8', 'mxfp4', and of"):
        read(tmp_path / "plain")


def test_a_compressed_checkpoint_of_another_pack():
    with pytest.raises(ValueError, match="packed as 'awq'; plain weights, 'fp8', 'mxfp4', and of"):
        StructuredConfig(packed={"quant_method": "awq"})


def change(folder, name, tensor):
    """Put another tensor, or none, into a packed checkpoint."""
    tensors = load_file(folder / "model.safetensors") | {name: tensor}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    rewrite(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None}, config)


NAN = torch.full((48, 32), float("nan")).to(torch.float8_e4m3fn)
UP, EXPERT = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.experts.3.up_proj.weight"
BAD = [
    ("llama", UP, NAN, rf"{UP}: fp8: 1536 of 1536 codes are NaN \(0x7f or 0xff\)"),
    ("llama", f"{UP}_scale_inv", torch.tensor([[float("inf")]]), rf"{UP}: fp8: 1 of 1 scales are NaN or infinite"),
    ("llama", f"{UP}_scale_inv", None, rf"{UP}: stored as float8_e4m3fn without scales; in a checkpoint packed as fp8"),
    ("llama", UP, None, rf"{UP}: weight is packed, but weight is missing; the checkpoint is incomplete"),
    ("qwen3_moe", EXPERT, NAN[:24], r"model.layers.2.mlp.experts.gate_up_proj: fp8: 768 of 768 codes are NaN"),
    ("qwen3_moe", f"{EXPERT}_scale_inv", None, r"experts.gate_up_proj: the parts of the experts do not match \(4 of"),
    (
        "gpt_oss",
        "model.layers.1.mlp.experts.down_proj_scales",
        torch.full((4, 32, 2), 255, dtype=torch.uint8),
        r"model.layers.1.mlp.experts.down_proj: mxfp4: 256 of 256 scales are NaN \(255\)",
    ),
]


@pytest.mark.parametrize(("family", "name", "tensor", "sentence"), BAD)
def test_damaged_tensors(family, name, tensor, sentence, tmp_path):
    save_packed(tmp_path, family)
    change(tmp_path / "packed", name, tensor)
    with pytest.raises(ValueError, match=f"packed could not be loaded: .*{sentence}"):
        load_model(tmp_path / "packed")


def test_a_tensor_that_no_rule_is_about(tmp_path):
    """A stack of fp8 experts, which transformers has no table for: cast without its scales it would be wrong."""
    save_packed(tmp_path, "gpt_oss")
    folder = tmp_path / "plain"
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    rewrite(folder, tensors, fp8_config())
    with pytest.raises(ValueError, match=rf"{name} is stored as F8_E4M3, and nothing says how a checkpoint packed as"):
        load_model(folder)
