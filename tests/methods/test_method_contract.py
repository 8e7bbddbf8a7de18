"""What every method owes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import tensormix.methods
from tensormix.methods import (
    METHODS,
    Auto,
    BlastMethod,
    BlockMethod,
    BttMethod,
    Coala,
    DenseSparseTt,
    DobiSvd,
    DropBlocks,
    FlatLlm,
    Gptq,
    HassleFree,
    Hqq,
    JointMethod,
    Laser,
    LeStd,
    LinearMethod,
    MeanOutput,
    Method,
    Mixt,
    MixtChain,
    MixtLowRank,
    MixtRotated,
    MixtSparse,
    ModelMethod,
    MonarchMethod,
    Narrow,
    PerHeadTt,
    RoundedLowRank,
    RoundedSparse,
    Rtn,
    Sola,
    SpanMethod,
    StackMethod,
    Svd,
    SvdLlm,
    TensorTrainMethod,
    Trawl,
    TuckerAttention,
    ZeroMethod,
)
from tensormix.methods.base import Heads, Layer
from tensormix.methods.sola import Ranks
from tensormix.operators import build

I, O = 48, 80

CASES = [
    Mixt(num_branches=3),
    MixtLowRank(keep=0.4, num_branches=3, rounds=3),
    MixtSparse(keep=0.3, num_branches=3, rounds=2),
    MixtChain(num_branches=2, num_factors=2, steps=5),
    MixtRotated(num_branches=3, steps=5),
    MonarchMethod(keep=0.4, steps=5),
    Mixt(num_branches=2, init="random", padding="power"),
    Mixt(num_branches=2, init="zero"),
    Mixt(num_branches=3, init="aware"),
    TensorTrainMethod(keep=0.4),
    TensorTrainMethod(rank=4, modes=3, weighted=True, steps=5),
    DenseSparseTt(keep=0.4, share=0.01),
    DenseSparseTt(keep=0.4, selector="activation"),
    DenseSparseTt(rank=4, modes=3, selector="activation", weighted=True, steps=5),
    BttMethod(keep=0.6),
    BttMethod(rank=2, in_blocks=3, out_blocks=4, weighted=True, steps=5),
    BlastMethod(keep=0.5, blocks=4, steps=5),
    BlastMethod(rank=3, weighted=True, steps=5),
    Svd(keep=0.3),
    ZeroMethod(),
    MeanOutput(),
    SvdLlm(keep=0.3),
    SvdLlm(keep=0.9, update=True),
    Coala(keep=0.3),
    Coala(keep=0.9, mu=0.1),
    Laser(keep_rank=0.2),
    HassleFree(keep=0.5, low_rank_share=0.3, steps=2),
    HassleFree(pattern="2:4", rank=0, steps=2),
    DobiSvd(rank=7),
    DobiSvd(keep=0.5, storage="remapped", pca="incremental"),
    Rtn(bits=8),
    Gptq(bits=3, group=16),
    Gptq(bits=4, of=SvdLlm(keep=0.5)),
    Gptq(bits=2, group=16, zero_bits=8),
    Hqq(bits=2, group=16),
    Hqq(bits=3, granularity="channel", of=SvdLlm(keep=0.5)),
    RoundedLowRank(bits=3, group=16, rank=2),
    RoundedSparse(bits=3, group=16, share=0.02),
    Rtn(bits=4, granularity="channel", of=SvdLlm(keep=0.5)),
]


def statistics(method, in_features=I):
    stats, x = {needed: needed(in_features) for needed in method.needs}, torch.randn(20, in_features) + 1
    for statistic in stats.values():
        statistic.update(x)
    return stats


@pytest.fixture(params=CASES, ids=lambda method: f"{method.name}-{getattr(method, 'init', '')}")
def method(request):
    torch.manual_seed(0)
    return request.param


def test_every_linear_method_has_a_case():
    linear = {cls for cls in METHODS.values() if issubclass(cls, LinearMethod)}
    assert linear == {type(method) for method in CASES}


def test_the_table_holds_every_method_that_is_written():
    bases = {
        "Method",
        "LinearMethod",
        "JointMethod",
        "BlockMethod",
        "SpanMethod",
        "StackMethod",
        "ModelMethod",
        "Hybrid",
        "IntegerGrid",
        "RoundedParts",
        "RoundedSum",
        "Rounding",
        "SharedTucker",
        "TrainSettings",
        "Weighted",
    }
    written = set()
    for path in Path(tensormix.methods.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and {getattr(base, "id", "") for base in node.bases} & bases:
                written.add(node.name)
    assert written - bases == {cls.__name__ for cls in METHODS.values()}


@pytest.mark.parametrize("name", METHODS)
def test_the_table_key_is_the_name_and_the_words_are_there(name):
    cls = METHODS[name]
    assert cls.model_fields["name"].default == name
    assert cls.source and cls.summary.endswith(".")
    kinds = {
        "matrix": LinearMethod, "stack": StackMethod, "layers": JointMethod,
        "block": BlockMethod, "span": SpanMethod, "model": ModelMethod, "choice": Auto,
    }  # fmt: skip
    assert issubclass(cls, kinds[cls.takes])
    assert isinstance(cls.needs, tuple)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_empty_is_what_fit_gives_without_the_numbers(method, dtype):
    weight = torch.randn(O, I, dtype=dtype)
    before = weight.clone()
    fitted, empty = method.fit(weight, statistics(method)), method.empty(I, O)
    assert empty.spec == fitted.spec
    assert (empty.num_params, empty.macs_per_token) == (fitted.num_params, fitted.macs_per_token)
    shapes = {name: tensor.shape for name, tensor in fitted.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    assert all(p.dtype == dtype for p in fitted.parameters())  # integers and their scales are buffers
    assert all(p.isfinite().all() and p.requires_grad and p.is_leaf for p in fitted.parameters())
    assert torch.equal(weight, before)


def test_fit_is_repeatable(method):
    weight, stats = torch.randn(O, I), statistics(method)
    first, again = method.fit(weight, stats).state_dict(), method.fit(weight, stats).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_fit_takes_the_parameter_of_a_module(method):
    layer = torch.nn.Linear(I, O)
    assert build(method.fit(layer.weight, statistics(method)).spec).out_features == O


def test_methods_are_frozen_and_survive_json(method):
    with pytest.raises(ValidationError, match="frozen"):
        method.name = "other"
    again: Method = type(method).model_validate_json(method.model_dump_json())
    assert again == method and hash(again) == hash(method)


# Methods that change the layers of a block together: 4 heads of 8 channels, 2 of keys and values, 40 neurons.
HEADS = Heads(4, 2, 8)
SHAPES = {
    "q": (32, 24), "k": (16, 24), "v": (16, 24), "o": (24, 32), "gate": (40, 24), "up": (40, 24), "down": (24, 40)
}  # fmt: skip
JOINT = [
    FlatLlm(keep=0.7),
    FlatLlm(keep=1.0),
    Narrow(keep=0.3),
    Narrow(keep=0.3, width=0.5),
    Narrow(keep=1.0),
    Narrow(keep=0.3, width=0.5, rounding=Gptq(bits=3, group=16)),
    FlatLlm(keep=0.7, rounding=Gptq(bits=4, granularity="tensor")),
    FlatLlm(keep=1.0, rounding=Hqq(bits=3, group=16)),
    Narrow(keep=0.3, rounding=Rtn(bits=4, granularity="channel")),
    Sola(ranks=Ranks(q=3, k=4, o=5, gate=6, up=7, down=8)),
    Sola(ranks=Ranks(q=3, up=7), prime=0.0),
    Sola(keep=1.0, prime=0.5),
    TuckerAttention(ranks=(5, 3, 2)),
    LeStd(ranks=(5, 3, 2)),
    LeStd(keep=0.4, density=0.1),
    PerHeadTt(keep=0.7, modes=2),
    PerHeadTt(rank=2, modes=3),
    PerHeadTt(keep=1.0),
    Trawl(ranks=(5, 3, 2)),
]
BIASED = ("q", "v", "up", "down")


def shapes_of(method):
    return {role: shape for role, shape in SHAPES.items() if role in method.roles}


def joint_inputs(method, dtype=torch.float32):
    layers = {
        role: Layer(torch.randn(shape, dtype=dtype), torch.randn(shape[0], dtype=dtype) if role in BIASED else None)
        for role, shape in shapes_of(method).items()
    }
    stats = {}
    for role, shape in shapes_of(method).items():
        stats[role] = {kind: kind(shape[1]) for kind in method.needs_at(role)}
        x = torch.randn(20, shape[1])  # fewer tokens than the down projection has inputs
        for statistic in stats[role].values():
            statistic.update(x)
    return layers, stats


def test_every_joint_method_has_a_case():
    assert {cls for cls in METHODS.values() if issubclass(cls, JointMethod)} == {type(method) for method in JOINT}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("joint", JOINT, ids=str)
def test_joint_fits_keep_shapes_dtypes_and_biases_and_are_foreseen(joint, dtype):
    torch.manual_seed(0)
    layers, stats = joint_inputs(joint, dtype)
    before = {role: layer.weight.clone() for role, layer in layers.items()}
    fitted, empty = joint.fit(layers, stats, HEADS), joint.empty(shapes_of(joint), HEADS)
    again = joint.fit(layers, stats, HEADS)
    assert fitted.keys() == empty.keys() == shapes_of(joint).keys()
    for role, op in fitted.items():
        assert op.spec == empty[role].spec and (op.out_features, op.in_features) == SHAPES[role]
        assert {tensor.device.type for tensor in empty[role].state_dict().values()} == {"meta"}
        assert (op.bias is not None) == (role in BIASED)
        assert all(p.dtype == dtype and p.isfinite().all() and p.is_leaf for p in op.parameters())
        assert torch.equal(layers[role].weight, before[role])
        assert all(torch.equal(again[role].state_dict()[name], tensor) for name, tensor in op.state_dict().items())


@pytest.mark.parametrize("joint", JOINT, ids=str)
def test_joint_methods_are_frozen_and_survive_json(joint):
    with pytest.raises(ValidationError, match="frozen"):
        joint.name = "other"
    again = type(joint).model_validate_json(joint.model_dump_json())
    assert again == joint and hash(again) == hash(joint)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Mixt(num_branches=3, branches=2), r"branches\n\s+Extra inputs are not permitted"),
        (lambda: ZeroMethod(keep=0.5), r"keep\n\s+Extra inputs are not permitted"),
        (lambda: Mixt(), r"num_branches\n\s+Field required"),
        (lambda: Mixt(num_branches=0), r"greater than or equal to 1"),
        (lambda: Mixt(num_branches=True), r"valid integer"),
        (lambda: Mixt(num_branches=3, bond=1), r"greater than or equal to 2"),
        (lambda: Mixt(num_branches=3, padding="powers"), r"'multiple' or 'power'"),
        (lambda: Mixt(num_branches=3, init="match"), r"'matched', 'aware', 'zero' or 'random'"),
        (lambda: Svd(keep=0), r"greater than 0"),
        (lambda: Svd(keep=1.5), r"less than or equal to 1"),
        (lambda: DropBlocks(num_blocks=3), r"Extra inputs are not permitted"),
        (lambda: Mixt(num_branches=5).empty(64, 128), r"largest possible is 4\."),
        (lambda: Mixt(num_branches=5).fit(torch.zeros(128, 64), {}), r"largest possible is 4\."),
        (
            lambda: Svd(keep=0.01).empty(64, 128),
            r"Svd: keep=0\.01 leaves no rank for a 64x128 layer; the smallest usable keep is 0\.0235\.",
        ),
    ],
)
def test_errors_say_what_is_allowed(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
