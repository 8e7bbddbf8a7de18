"""Weight matching against a dense least-squares solve, its known energy, and its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensormix
from tensormix.operators import MixT
from tensormix.operators.mixt import largest_num_branches

UNPADDED = [
    (80, 48, {"num_branches": 3}),
    (48, 80, {"num_branches": 3}),
    (192, 64, {"num_branches": 4}),
    (96, 32, {"num_branches": 3}),
    (32, 32, {"num_branches": 3}),
    (16, 64, {"num_branches": 3}),
    (64, 16, {"num_branches": 2}),
    (64, 64, {"num_branches": 4}),
    (32, 32, {"num_branches": 4}),  # windows share bonds
    (32, 32, {"num_branches": 5}),
    (16, 16, {"num_branches": 4, "padding": "power"}),
    (54, 27, {"num_branches": 2, "bond": 3}),
    (27, 27, {"num_branches": 3, "bond": 3}),
    (5, 7, {"num_branches": 1}),
]
PADDED = [
    (50, 33, {"num_branches": 3}),
    (33, 50, {"num_branches": 2}),
    (48, 47, {"num_branches": 3}),
    (70, 65, {"num_branches": 4}),
    (50, 33, {"num_branches": 3, "padding": "power"}),
    (33, 33, {"num_branches": 4, "padding": "power"}),
    (29, 30, {"num_branches": 2, "bond": 3}),
    (29, 30, {"num_branches": 2, "bond": 3, "padding": "power"}),
]


def design(in_features, out_features, **sizes):
    """The matrix from the numbers of all cores to the entries of the cropped W, with Kronecker products written out."""
    op = MixT(in_features, out_features, **sizes)
    columns = []
    for left, right in op.windows:
        for o in range(op.core_out):
            for i in range(op.core_in):
                unit = torch.zeros(op.core_out, op.core_in, dtype=torch.float64)
                unit[o, i] = 1
                full = torch.kron(torch.kron(torch.eye(left), unit), torch.eye(right))
                columns.append(full[:out_features, :in_features].flatten())
    return torch.stack(columns, 1)


def optimum(weight, **sizes):
    """The nearest W by a dense least-squares solve that allows for the redundant cores."""
    matrix = design(weight.shape[1], weight.shape[0], **sizes)
    solution = torch.linalg.lstsq(matrix, weight.reshape(-1, 1), driver="gelsd").solution
    return (matrix @ solution).reshape(weight.shape)


@pytest.mark.parametrize(("in_features", "out_features", "sizes"), UNPADDED + PADDED)
def test_it_equals_a_dense_least_squares_solve(in_features, out_features, sizes):
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    fitted = MixT.from_dense(weight, **sizes).to_dense()
    torch.testing.assert_close(fitted, optimum(weight, **sizes), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("in_features", "out_features", "sizes"), UNPADDED + PADDED)
def test_a_mixture_is_recovered(in_features, out_features, sizes):
    """In fp32, too: the same W comes back, although not the same cores, because the branches share directions."""
    torch.manual_seed(0)
    truth = MixT(in_features, out_features, **sizes)
    for core in truth.cores:
        torch.nn.init.normal_(core)
    for dtype in (torch.float64, torch.float32):
        wanted = truth.to(dtype).to_dense().detach()
        error = (MixT.from_dense(wanted, **sizes).to_dense() - wanted).norm() / wanted.norm()
        assert error.detach() < 100 * torch.finfo(dtype).eps


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(2, 3), st.sampled_from(["multiple", "power"]), st.data())
def test_what_is_left_over_is_orthogonal_to_every_branch(in_features, out_features, bond, padding, data):
    """The normal equations of the least-squares problem, for any shape: no change of any core can lower the error."""
    largest = largest_num_branches(in_features, out_features, bond=bond, padding=padding)
    num_branches = data.draw(st.integers(1, largest))
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    op = MixT.from_dense(weight, num_branches=num_branches, bond=bond, padding=padding)
    loss = (weight - op.to_dense()).square().sum()
    for gradient in torch.autograd.grad(loss, op.cores):
        assert gradient.abs().max() < 1e-10 * weight.norm()


@pytest.mark.parametrize(("n", "num_branches"), [(64, 2), (64, 3), (256, 4)])
def test_noise_keeps_the_energy_of_the_degrees_of_freedom(n, num_branches):
    """A projection keeps dof / (m n) of white noise; its relative standard deviation is sqrt(2 / dof)."""
    torch.manual_seed(0)
    weight = torch.randn(n, n, dtype=torch.float64)
    op = MixT.from_dense(weight, num_branches=num_branches)
    dof = op.num_params - (num_branches - 1) * (op.core_in // 2) * (op.core_out // 2)
    kept = op.to_dense().square().sum() / weight.square().sum()
    assert abs(float(kept.detach()) / (dof / n**2) - 1) < 5 * (2 / dof) ** 0.5


def test_half_precision_weights_are_matched_in_fp32():
    torch.manual_seed(0)
    weight = torch.randn(64, 48).bfloat16()
    for sizes in ({"num_branches": 3}, {"num_branches": 3, "padding": "power"}):
        wide = MixT.from_dense(weight.float(), **sizes)
        for core, expected in zip(MixT.from_dense(weight, **sizes).cores, wide.cores, strict=True):
            assert torch.equal(core, expected.bfloat16())


MEASURE = """
import sys, time
import torch
from tensormix.operators import MixT

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

MixT.from_dense(torch.randn(65, 65), num_branches=3)  # what the libraries allocate once
before = status("RssAnon")
weight = torch.randn(4096, 11008)
start = time.process_time()
MixT.from_dense(weight, num_branches=4, padding=sys.argv[1])
seconds = time.process_time() - start
peak = status("VmHWM") - status("RssFile") - before  # RssFile: the mapped libraries, only ever read
print(peak / (weight.numel() * 4), seconds)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("padding", ["multiple", "power"])
def test_a_large_layer_takes_three_times_its_memory_and_seconds(padding):
    """The weight itself is one of the three; `power` pads 11008 to 16384."""
    env = {**os.environ, "PYTHONPATH": str(Path(tensormix.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", MEASURE, padding], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    memory, seconds = map(float, run.stdout.split())
    assert 1.9 < memory < 3, f"peak memory is {memory:.2f} times the weight"
    assert seconds < 60, f"took {seconds:.0f} seconds of processor time"
