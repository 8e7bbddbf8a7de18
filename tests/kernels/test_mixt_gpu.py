"""The Triton kernel against its meaning, under Triton's interpreter; on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from tensormix.kernels.mixt import reference

pytest.importorskip("triton", reason="Triton is not installed; it comes with the extra 'triton'")


@pytest.fixture(scope="module")
def gpu():
    """The module of the kernel; where there is no GPU, its functions are interpreted (conftest.py)."""
    from tensormix.kernels.mixt import gpu

    return gpu


def problem(num_tokens, I, O, K, d, c_in, c_out, dtype=torch.float32):
    torch.manual_seed(0)
    S, device = d ** (K - 1), "cuda" if torch.cuda.is_available() else "cpu"
    cores = [torch.randn(S * c_out, S * c_in, device=device).to(dtype) for _ in range(K)]
    return torch.randn(num_tokens, I, device=device).to(dtype), cores, d, O


@pytest.mark.parametrize("num_tokens", [1, 5, 21])
@pytest.mark.parametrize(
    "sizes",
    [
        (192, 320, 4, 2, 3, 5),  # neither core bond fills its tiles
        (190, 319, 4, 2, 3, 5),  # padded and cropped
        (48, 80, 3, 2, 3, 5),
        (64, 128, 2, 4, 4, 8),
        (40, 24, 1, 2, 40, 24),
        (72, 27, 2, 3, 8, 3),  # a bond that is no power of two goes to the reference
    ],
    ids=str,
)
def test_it_is_the_reference(gpu, num_tokens, sizes):
    x, cores, d, O = problem(num_tokens, *sizes)
    truth = reference.mixt(x.double(), [core.double() for core in cores], d, O)
    plain = reference.mixt(x, cores, d, O)
    y = gpu.mixt(x, cores, d, O)
    assert y.dtype == x.dtype and y.shape == (num_tokens, O)
    assert (y - truth).norm() <= 2 * (plain - truth).norm() + 1e-7 * truth.norm()


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_transposed_cores_are_read_in_place(gpu, num_tokens):
    x, cores, d, O = problem(num_tokens, 192, 320, 4, 2, 3, 5)
    turned = [core.t().contiguous().t() for core in cores]
    torch.testing.assert_close(gpu.mixt(x, turned, d, O), gpu.mixt(x, cores, d, O), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [2, 20])
def test_in_half_precision_the_error_is_at_most_twice_that_of_plain_pytorch(gpu, num_tokens):
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter multiplies no bf16
    x, cores, d, O = problem(num_tokens, 192, 320, 4, 2, 3, 5, dtype)
    truth = reference.mixt(x.double(), [core.double() for core in cores], d, O)
    plain = reference.mixt(x, cores, d, O)
    assert (gpu.mixt(x, cores, d, O) - truth).norm() <= 2 * (plain - truth).norm()


def test_what_the_kernel_takes(gpu):
    fits = {
        sizes: gpu.fits([torch.empty(sizes[0], sizes[1])] * sizes[2], sizes[3])
        for sizes in [(512, 1376, 4, 2), (4, 4, 4, 2), (9, 9, 2, 3), (128, 128, 8, 2)]
    }
    assert list(fits.values()) == [True, False, False, False]
