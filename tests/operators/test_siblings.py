"""Mixtures that are stored and multiplied as one: what they compute, their gradients, what is saved and loaded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tensormix.kernels.mixt import cpu, siblings, stack_cores
from tensormix.operators import MixT, Siblings, build
from tensormix.operators.mixt import largest_num_branches
from tensormix.profile import LiveBytes


def named(operators):
    return {f"layer_{number}": operator for number, operator in enumerate(operators)}


def siblings_of(operators):
    parts = list(operators)
    return Siblings(names=[f"layer_{number}" for number in range(len(parts))], parts=parts)


def layers(I, out_features, num_branches=3, dtype=torch.float64, **sizes):
    generator = torch.Generator().manual_seed(0)
    made = [MixT(I, O, num_branches=num_branches, **sizes).to(dtype) for O in out_features]
    for layer in made:
        layer.bias = nn.Parameter(torch.empty(layer.out_features, dtype=dtype))
        for parameter in layer.parameters():
            nn.init.normal_(parameter, generator=generator)
    return made


@settings(deadline=None, max_examples=20)
@given(st.integers(16, 50), st.lists(st.integers(16, 50), min_size=2, max_size=3), st.integers(1, 3), st.data())
def test_siblings_are_the_separate_layers_and_so_are_their_gradients(I, out_features, num_branches, data):
    padding = data.draw(st.sampled_from(["multiple", "power"]))
    num_branches = min([num_branches, *(largest_num_branches(I, O, padding=padding) for O in out_features)])
    alone = layers(I, out_features, num_branches, padding=padding)
    x = torch.randn(data.draw(st.sampled_from([1, 5, 14])), I, dtype=torch.float64, requires_grad=True)
    together = siblings_of(alone)
    ys, wanted = [*together(x).values()], [layer.multiply(x) for layer in alone]
    torch.testing.assert_close(ys, wanted, rtol=1e-12, atol=1e-11)
    cores = [core for layer in alone for core in layer.cores]
    dx, *grads = torch.autograd.grad(torch.stack([y.square().sum() for y in wanted]).sum(), [x, *cores])
    each = [list(grads[n : n + num_branches]) for n in range(0, len(grads), num_branches)]
    found = torch.autograd.grad(torch.stack([y.square().sum() for y in ys]).sum(), [x, *together.cores])
    torch.testing.assert_close(found, (dx, *stack_cores(each, 2)), rtol=1e-10, atol=1e-8)


def test_gradients_are_right():
    together = siblings_of(layers(20, (16, 30)))
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: tuple(together(x).values()), (x, *together.cores), fast_mode=True)


@pytest.fixture
def family():
    alone = named(layers(20, (32, 16, 30)))
    together = siblings_of(alone.values())
    return alone, together, together.views("siblings")


def test_a_view_of_siblings_is_the_layer_that_it_stands_for(family):
    alone, together, views = family
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    for name, layer in alone.items():
        view = views[name]
        assert torch.equal(view.multiply(x), layer.multiply(x)) and torch.equal(view.to_dense(), layer.to_dense())
        assert view.macs_per_token == layer.macs_per_token
    assert together.num_params == sum(layer.num_params for layer in alone.values())
    assert together.num_bits == sum(layer.num_bits for layer in alone.values())


def test_what_is_saved_builds_the_same_product_again(family):
    _, together, _ = family
    again = build(together.spec).double()
    again.load_state_dict(together.state_dict())
    x = torch.randn(5, 20, dtype=torch.float64)
    assert all(torch.equal(y, wanted) for y, wanted in zip(again(x).values(), together(x).values(), strict=True))
    state = together.state_dict()
    del state["core_2"]
    with pytest.raises(RuntimeError, match="core_2"):
        again.load_state_dict(state)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: MixT(24, 32, num_branches=3), "in_features is 32 and 24"),
        (lambda: MixT(32, 32, num_branches=2), "num_branches is 3 and 2"),
        (lambda: MixT(32, 48, num_branches=1, bond=3), "num_branches is 3 and 1"),
        (lambda: MixT(32, 32, num_branches=3).bfloat16(), "dtype is torch.float32 and torch.bfloat16"),
        (lambda: MixT(32, 32, num_branches=3).requires_grad_(False), "requires_grad is True and False"),
        (
            lambda: MixT(32, 32, num_branches=4),
            "with num_branches=4 a 32x32 layer has no core-out bond: its branches share bonds",
        ),
    ],
)
def test_what_cannot_be_one_product_is_refused(other, reason):
    with pytest.raises(ValueError, match=f"^Siblings: {reason}$"):
        siblings_of([MixT(32, 48, num_branches=3), other()])


def test_bonds_of_different_dimension_stay_apart():
    with pytest.raises(ValueError, match=r"^Siblings: bond is 2 and 3$"):
        siblings_of([MixT(72, 72, num_branches=2), MixT(72, 72, num_branches=2, bond=3)])


def test_paddings_to_different_sizes_stay_apart():
    with pytest.raises(ValueError, match=r"^Siblings: core_in is 12 and 16$"):
        siblings_of([MixT(48, 48, num_branches=3), MixT(48, 48, num_branches=3, padding="power")])


def test_a_wrong_number_of_features_is_refused(family):
    with pytest.raises(ValueError, match=r"^Siblings: the layers take 20 features, got 40$"):
        family[1](torch.randn(2, 40, dtype=torch.float64))


def test_autocast_is_that_of_the_separate_layers():
    alone = layers(32, (32, 16), dtype=torch.float32)
    x = torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        for y, layer in zip(siblings_of(alone)(x).values(), alone, strict=True):
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y, layer.multiply(x))


def peak(call, *alive):
    """Bytes alive at the worst moment beside those of `alive`; what the kernel allocates inside itself is seen."""
    with torch.no_grad(), LiveBytes() as mode:
        mode.known |= {tensor.untyped_storage()._cdata for tensor in alive}
        outputs = call()
    del outputs
    return mode.peak


@pytest.mark.parametrize("num_tokens", [1, 64, 2048])
def test_memory_is_that_of_the_dense_layers_and_scratch_that_does_not_grow_with_the_tokens(num_tokens):
    """Dense layers make the outputs too. The rest: the outputs once more while they are few, or cores, and scratch."""
    I, out_features = 1024, (1024, 512, 512)
    cores = siblings_of(layers(I, out_features, dtype=torch.float32)).cores
    x = torch.randn(num_tokens, I)
    used = peak(
        lambda: siblings.mixt_siblings(x, cores, 2, (64, 32, 32), out_features, cpu.mixt, siblings.MOST), x, *cores
    )
    kernel = peak(lambda: cpu.mixt(x, cores, 2, sum(out_features)), x, *cores) - 4 * num_tokens * sum(out_features)
    scratch = max(4 * siblings.MOST, sum(core.nbytes for core in cores))
    assert used - 4 * num_tokens * sum(out_features) <= scratch + kernel
