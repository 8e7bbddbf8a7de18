"""The operators tensormix::mixt and mixt_cores against their meaning, their gradients, their memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.kernels.mixt import cpu, mixt, mixt_cores, reference
from tensormix.operators import MixT
from tensormix.profile import LiveBytes

BLOCK = cpu.BLOCK // 8  # tokens of a block in float64
NUM_TOKENS = (0, 1, cpu.FEW, cpu.FEW + 1, BLOCK, BLOCK + 1, cpu.B * BLOCK, 2 * cpu.B * BLOCK + 2 * BLOCK + 1)
NUM_TOKENS += (cpu.DEPTH // 8 + 3, cpu.CHUNK + 1, 8 * cpu.MANY - 1, 8 * cpu.MANY)


def problem(num_tokens, I=40, O=56, *, K=3, d=2, Q=16, P=12, dtype=torch.float64):
    """Tokens, cores and gradients of outputs; the padded sizes are P d^(K-1) and Q d^(K-1)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, I, generator=generator, dtype=torch.float64)
    cores = [torch.randn(Q, P, generator=generator, dtype=torch.float64) for _ in range(K)]
    dy = torch.randn(num_tokens, O, generator=generator, dtype=torch.float64)
    return x.to(dtype), [core.to(dtype) for core in cores], dy.to(dtype), d


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_every_number_of_tokens_gives_the_reference(num_tokens):
    x, cores, dy, d = problem(num_tokens)
    torch.testing.assert_close(mixt(x, cores, d, 56), reference.mixt(x, cores, d, 56), rtol=1e-12, atol=1e-12)
    grads = mixt_cores(dy, x, (16, 12), 3, d)
    torch.testing.assert_close(grads, reference.mixt_cores(dy, x, (16, 12), 3, d), rtol=1e-12, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(2, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 150), st.data())
def test_any_size_gives_the_reference(K, d, Q, P, num_tokens, data):
    I = data.draw(st.integers(1, P * d ** (K - 1)))
    O = data.draw(st.integers(1, Q * d ** (K - 1)))
    x, cores, dy, d = problem(num_tokens, I, O, K=K, d=d, Q=Q, P=P)
    torch.testing.assert_close(mixt(x, cores, d, O), reference.mixt(x, cores, d, O), rtol=1e-12, atol=1e-11)
    grads = mixt_cores(dy, x, (Q, P), K, d)
    torch.testing.assert_close(grads, reference.mixt_cores(dy, x, (Q, P), K, d), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_lie_anywhere_in_memory_give_the_reference(dtype):
    """Columns of a wider matrix, every other token, an address that no unit of features divides, one row for all."""
    x, cores, dy, d = problem(80, 48, 56, K=3, Q=14, P=12, dtype=dtype)
    storage = torch.empty(1 + x.numel(), dtype=dtype)
    odd = storage[1:].view(80, 48).copy_(x)
    for rows in (torch.cat([x, x], 1)[:, :48], x.repeat_interleave(2, 0)[::2], odd, x.t().contiguous().t()):
        torch.testing.assert_close(mixt(rows, cores, d, 56), mixt(x, cores, d, 56))
        torch.testing.assert_close(mixt_cores(dy, rows, (14, 12), 3, d), mixt_cores(dy, x, (14, 12), 3, d))
    ones = dy.new_ones(1, 1).expand(80, 56)  # what the sum of a layer's outputs hands back
    given_ = mixt_cores(ones, x, (14, 12), 3, d)
    torch.testing.assert_close(given_, mixt_cores(ones.contiguous(), x, (14, 12), 3, d))


def test_rows_of_a_buffer_that_begins_anywhere_give_the_reference():
    """As in a mapped file: whether rows are aligned to 16 bytes, their offset in the storage does not say."""
    x, cores, dy, d = problem(80, 48, 56, K=3, Q=14, P=12, dtype=torch.float32)
    room = bytearray(4 * x.numel() + 64)
    first = (4 - torch.frombuffer(room, dtype=torch.uint8).data_ptr()) % 16  # the storage begins 4 bytes beyond 16
    storage = torch.frombuffer(room, dtype=torch.float32, offset=first, count=x.numel() + 3)
    rows = storage[3:].view(80, 48).copy_(x)  # and these rows at a multiple of 16
    assert rows.data_ptr() % 16 == 0 and rows.storage_offset() == 3
    torch.testing.assert_close(mixt(rows, cores, d, 56), mixt(x, cores, d, 56))
    torch.testing.assert_close(mixt_cores(dy, rows, (14, 12), 3, d), mixt_cores(dy, x, (14, 12), 3, d))


def test_what_is_summed_over_very_many_tokens_loses_no_addend():
    """Ones, in outputs that need padding: in bfloat16 a sum stops growing at 256 times its addend."""
    x, dy = (torch.ones(600 * 128, size, dtype=torch.bfloat16) for size in (48, 50))
    many, few = (mixt_cores(dy[:n], x[:n], (14, 12), 3, 2).float() for n in (600 * 128, 128))
    torch.testing.assert_close(many, 600 * few, rtol=0.01, atol=0)


@pytest.mark.parametrize("K", [1, 2])
def test_few_branches_and_many_tokens_give_the_reference(K):
    x, cores, _, d = problem(8 * cpu.MANY, 4, 6, K=K, Q=6, P=4)
    torch.testing.assert_close(mixt(x, cores, d, 6), reference.mixt(x, cores, d, 6), rtol=1e-12, atol=1e-12)


def test_gradients_of_many_tokens_are_summed_wide():
    """Of positive numbers, so that each part that is added rounds a larger sum."""
    x, _, dy, _ = problem(4096, 48, 56, K=3, Q=14, P=12)
    x, dy = x.abs().bfloat16(), dy.abs().bfloat16()
    truth, plain = (
        reference.mixt_cores(dy.double(), x.double(), (14, 12), 3, 2),
        reference.mixt_cores(dy, x, (14, 12), 3, 2),
    )
    assert (mixt_cores(dy, x, (14, 12), 3, 2) - truth).norm() <= 2 * (plain - truth).norm()


def test_a_large_core_is_taken_part_by_part_and_gives_the_same(monkeypatch):
    x, cores, _, d = problem(3, 24 * 4, 64 * 4, K=3, Q=64, P=24, dtype=torch.float32)
    whole = mixt(x, cores, d, 256)
    monkeypatch.setattr(cpu, "LARGE", 1)
    torch.testing.assert_close(mixt(x, cores, d, 256), whole)
    turned = [core.t().contiguous().t() for core in cores]
    torch.testing.assert_close(mixt(x, turned, d, 256), whole)


def test_the_reference_is_the_dense_product():
    op = MixT.from_dense(torch.randn(50, 33, dtype=torch.float64), num_branches=3)
    x = torch.randn(5, 33, dtype=torch.float64)
    torch.testing.assert_close(reference.mixt(x, op.cores, 2, 50), x @ op.to_dense().T)


@pytest.mark.parametrize("num_tokens", [2, 30])
def test_opcheck(num_tokens):
    x, cores, dy, d = problem(num_tokens, dtype=torch.float32)
    torch.library.opcheck(mixt, (x.requires_grad_(), [c.requires_grad_() for c in cores], d, 56))
    torch.library.opcheck(mixt_cores, (dy.requires_grad_(), x, [16, 12], 3, d))


@pytest.mark.parametrize("num_tokens", [2, 14])
def test_gradients_and_their_gradients_are_right(num_tokens):
    x, cores, _, d = problem(num_tokens, 7, 10, Q=3, P=2)
    inputs = [x.requires_grad_(), *(core.requires_grad_() for core in cores)]
    assert torch.autograd.gradcheck(lambda x, *cores: mixt(x, cores, d, 10), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, *cores: mixt(x, cores, d, 10), inputs, fast_mode=True)


def test_only_wanted_gradients_are_computed():
    x, cores, _, d = problem(20)
    mixt(x.requires_grad_(), cores, d, 56).sum().backward()
    assert x.grad is not None
    x.grad = None
    mixt(x.detach(), [core.requires_grad_() for core in cores], d, 56).sum().backward()
    assert x.grad is None and all(core.grad is not None for core in cores)


@pytest.mark.parametrize("num_tokens", [3, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_at_most_twice_that_of_plain_pytorch(dtype, num_tokens):
    x, cores, dy, d = problem(num_tokens, dtype=dtype)
    wide = x.double(), [core.double() for core in cores]
    truth, plain = reference.mixt(*wide, d, 56), reference.mixt(x, cores, d, 56)
    assert (mixt(x, cores, d, 56) - truth).norm() <= 2 * (plain - truth).norm()
    sizes = ((16, 12), 3, d)
    truth, plain = reference.mixt_cores(dy.double(), x.double(), *sizes), reference.mixt_cores(dy, x, *sizes)
    assert (mixt_cores(dy, x, *sizes) - truth).norm() <= 2 * (plain - truth).norm()


def test_it_compiles_in_one_graph_with_gradients():
    op = MixT.from_dense(torch.randn(64, 48), num_branches=3)
    x = torch.randn(2, 5, 48, requires_grad=True)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(op(x).square().sum(), [x, *op.parameters()])
    given_ = torch.autograd.grad(compiled(x).square().sum(), [x, *op.parameters()])
    torch.testing.assert_close(given_, wanted)


def test_autocast_is_that_of_a_dense_layer():
    op = MixT.from_dense(torch.randn(64, 48), num_branches=3)
    x = torch.randn(5, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert op.core_0.grad is not None and op.core_0.grad.dtype == x.grad.dtype == torch.float32  # pyright: ignore
    truth = x.double() @ op.to_dense().double().T
    assert (y - truth).norm() < 0.02 * truth.norm()


def test_a_wrong_number_of_features_is_refused():
    op = MixT.from_dense(torch.randn(64, 48), num_branches=3)
    with pytest.raises(ValueError, match=r"^MixT: the layer takes 48 features, got 96$"):
        op(torch.randn(2, 96))


def peak(call, *alive):
    """Bytes alive at the worst moment beside those of `alive`; what the kernel allocates inside itself is seen."""
    with torch.no_grad(), LiveBytes() as mode:
        mode.known |= {tensor.untyped_storage()._cdata for tensor in alive}
        out = call()
    del out
    return mode.peak


def test_scratch_memory_does_not_grow_with_the_tokens():
    """Beside its output, which a dense layer makes too: a tile of inputs, one of outputs, and two branches as one."""
    I, O = 128, 64
    op = MixT.from_dense(torch.randn(O, I), num_branches=4)
    for num_tokens in (512, 2048):
        x = torch.randn(num_tokens, I)
        beside_output = peak(lambda x=x: cpu.mixt(x, op.cores, 2, O), x, *op.cores) - 4 * num_tokens * O
        assert beside_output == cpu.B * cpu.BLOCK * (I + O) + 4 * op.num_params


@pytest.mark.parametrize(("I", "O"), [(126, 64), (128, 70), (90, 100)])
def test_nor_does_it_where_sizes_are_padded(I, O):
    op = MixT.from_dense(torch.randn(O, I), num_branches=4)

    def beside_output(num_tokens):
        x = torch.randn(num_tokens, I)
        return peak(lambda: cpu.mixt(x, op.cores, 2, O), x, *op.cores) - 4 * num_tokens * O

    assert beside_output(4 * cpu.CHUNK) == beside_output(2 * cpu.CHUNK)


def test_training_keeps_the_input_and_nothing_else():
    op = MixT.from_dense(torch.randn(64, 128), num_branches=4)
    x = torch.randn(200, 128)
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = op(x)
    assert sum(kept.values()) == 4 * (x.numel() + op.num_params)
    del y


def test_training_takes_less_memory_than_the_dense_layer():
    """Saved input, gradients and scratch, at 512 tokens of a layer that is larger than its inputs' block."""
    I = O = 1024
    op = MixT.from_dense(torch.randn(O, I), num_branches=4)
    x, dy = torch.randn(512, I), torch.randn(512, O)
    dense = torch.nn.Linear(I, O, bias=False)

    def ours():
        y = cpu.mixt(x, op.cores, 2, O)
        return y, cpu.mixt(dy, [core.t() for core in op.cores], 2, I), cpu.mixt_cores(dy, x, (128, 128), 4, 2)

    def theirs():
        return x @ dense.weight.T, dy @ dense.weight, dy.T @ x

    known = (x, dy, dense.weight, *op.cores)
    assert peak(ours, *known) < 0.75 * peak(theirs, *known)
