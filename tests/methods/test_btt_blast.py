"""Block tensor trains and BLAST: known optima, low rank as the least that BLAST reaches, and what is refused."""

from __future__ import annotations

import pytest
import torch

from tensormix.fitting.output_error import output_error
from tensormix.methods import BlastMethod, BttMethod, Svd, SvdLlm
from tensormix.operators import Blast, BlockTensorTrain, LowRank, Monarch
from tensormix.operators.block_tensor_train import nearest_divisor
from tensormix.statistics import Gram

DOUBLE = {"dtype": torch.float64}
O, I = 40, 48


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def seen(inputs):
    gram = Gram(inputs.shape[-1])
    gram.update(inputs)
    return {Gram: gram}


def error(op, weight, stats):
    return output_error(weight - op.to_dense().detach(), stats[Gram].mean)


def test_btt_is_the_truncated_svd_of_every_slice():
    weight, sizes = draw(O, I), {"in_blocks": 6, "out_blocks": 5, "rank": 3}
    op = BlockTensorTrain.from_dense(weight, **sizes)
    slices = weight.reshape(8, 5, 6, 8).permute(1, 2, 0, 3)
    best = torch.linalg.svdvals(slices)[..., 3:].norm()
    torch.testing.assert_close((op.to_dense() - weight).norm().detach(), best, rtol=1e-10, atol=0)
    assert op.num_params == op.macs_per_token == 3 * (5 * I + 6 * O)


@pytest.mark.parametrize(("a", "b"), [(6, 5), (1, 1), (48, 40), (4, 10)])
def test_btt_of_full_rank_is_exact(a, b):
    weight = draw(O, I)
    op = BlockTensorTrain.from_dense(weight, in_blocks=a, out_blocks=b, rank=min(I // a, O // b))
    torch.testing.assert_close(op.to_dense().detach(), weight, rtol=1e-11, atol=1e-11)


def test_monarch_is_btt_of_equal_blocks():
    weight = draw(O, I)
    monarch = Monarch.from_dense(weight, blocks=4, rank=2)
    same = BlockTensorTrain.from_dense(weight, in_blocks=4, out_blocks=4, rank=2)
    assert all(torch.equal(same.state_dict()[name], tensor) for name, tensor in monarch.state_dict().items())
    assert monarch.spec["operator"] == "Monarch" and "in_blocks" not in monarch.spec


def test_btt_of_inputs_whose_blocks_do_not_correlate_is_the_optimum():
    """The error of the outputs then is the sum over slices, and whitening each gives the best of each."""
    weight, inputs = draw(O, I), torch.zeros(6 * 50, I, **DOUBLE)
    for block in range(6):  # tokens of their own for each block
        own = draw(50, 8, seed=block) @ draw(8, 8, seed=90 + block)
        inputs[50 * block : 50 * block + 50, 8 * block : 8 * block + 8] = own
    stats, method = seen(inputs), BttMethod(rank=3, in_blocks=6, out_blocks=5, weighted=True, steps=0)
    cut = 0.0
    for block in range(6):
        part = slice(8 * block, 8 * block + 8)
        root = torch.linalg.cholesky(stats[Gram].mean[part, part])
        whitened = (weight[:, part] @ root).reshape(8, 5, 8).transpose(0, 1)
        cut += float(torch.linalg.svdvals(whitened)[:, 3:].square().sum())
    start = error(method.fit(weight, stats), weight, stats)
    assert cut <= start * (1 + 1e-9) and start == pytest.approx(cut, rel=1e-3)  # a ridge of a thousandth
    assert start < error(BttMethod(rank=3, in_blocks=6, out_blocks=5).fit(weight, {}), weight, stats)


@pytest.mark.parametrize("seed", range(3))
def test_btt_fitted_to_the_outputs_is_better_there_than_projected(seed):
    weight, stats = draw(O, I, seed=seed), seen(draw(70, I, seed=10 + seed) @ draw(I, I, seed=20 + seed))
    plain = error(BttMethod(keep=0.5).fit(weight, {}), weight, stats)
    start = error(BttMethod(keep=0.5, weighted=True, steps=0).fit(weight, stats), weight, stats)
    fitted = error(BttMethod(keep=0.5, weighted=True).fit(weight, stats), weight, stats)
    assert fitted < start <= plain


@pytest.mark.parametrize("seed", range(3))
def test_blast_is_better_than_low_rank_of_its_rank(seed):
    weight, stats = draw(O, I, seed=seed), seen(draw(70, I, seed=10 + seed) @ draw(I, I, seed=20 + seed))
    ours = BlastMethod(rank=5, blocks=4)
    low, like = LowRank.from_dense(weight, rank=5), ours.fit(weight, {})
    assert (like.to_dense() - weight).norm() < 0.99 * (low.to_dense() - weight).norm()
    weighted = ours.model_copy(update={"weighted": True})
    best = SvdLlm(keep=5 * (O + I) / (O * I)).fit(weight, stats)
    assert best.rank == 5
    assert error(weighted.fit(weight, stats), weight, stats) < 0.99 * error(best, weight, stats)


def test_blast_starts_at_the_low_rank_itself():
    weight = draw(O, I)
    start = BlastMethod(rank=5, blocks=4, steps=0).fit(weight, {})
    low = LowRank.from_dense(weight, rank=5)
    torch.testing.assert_close(start.to_dense(), low.to_dense())
    assert start.num_params == start.macs_per_token == low.num_params + 16 * 5


def test_blast_of_full_rank_is_exact_and_blocks_of_its_form_are_fitted_well():
    weight = draw(O, I)
    op = Blast.from_dense(weight, blocks=4, rank=40, steps=0)
    torch.testing.assert_close(op.to_dense().detach(), weight, rtol=1e-10, atol=1e-10)
    planted = Blast(I, O, blocks=2, rank=2).double()
    with torch.no_grad():
        for seed, parameter in enumerate(planted.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
    target = planted.to_dense().detach()
    found = Blast.from_dense(target, blocks=2, rank=2, steps=500)
    low = Svd(keep=2 * (O + I) / (O * I)).fit(target, {})
    assert (found.to_dense() - target).norm() < 0.3 * (low.to_dense() - target).norm()


def test_counts_at_the_widths_of_real_models():
    assert BttMethod(rank=1).empty(4096, 4096).num_params == 2 * 64 * 4096
    assert BttMethod(rank=4).empty(576, 1536).spec | {} == {
        "operator": "BlockTensorTrain", "in_features": 576, "out_features": 1536, "in_blocks": 24, "out_blocks": 32,
        "rank": 4,
    }  # fmt: skip
    published = {(4096, 4096): 1024, (4096, 11008): 1488}
    for (into, out), rank in published.items():
        op = BlastMethod(rank=rank).empty(into, out)
        assert op.num_params == rank * (into + out + 256)
        assert 0.49 < op.num_params / (into * out) < 0.54
    for method in (BttMethod(keep=1.0), BlastMethod(keep=1.0)):
        for keep in method.allowed_sizes(1536, 576):
            assert method.sized(keep).empty(1536, 576).num_params <= keep * 1536 * 576 + 1e-6


def test_the_nearest_divisor():
    assert [nearest_divisor(48, wanted) for wanted in (1, 5, 7, 48, 99, 0)] == [1, 6, 8, 48, 48, 1]
    assert nearest_divisor(13, 13**0.5) == 1


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        (BttMethod(keep=0.5, in_blocks=7), ("in_blocks must divide 48", "got 7", "nearest that does is 8")),
        (BttMethod(keep=0.5, out_blocks=7), ("out_blocks must divide 40", "nearest that does is 8")),
        (BttMethod(keep=0.01), ("keep=0.01 leaves no rank", "smallest usable keep is 0.25")),
        (BttMethod(rank=9), ("rank 9", "largest usable rank is 4")),
        (BttMethod(keep=1.0, in_blocks=48, out_blocks=40), ("rank 1", "3840 numbers", "1920")),
        (BlastMethod(keep=0.5, blocks=5), ("blocks must divide both sizes", "got 5", "nearest that does is 4")),
        (BlastMethod(keep=0.01, blocks=4), ("keep=0.01 leaves no rank", "smallest usable keep is 0.054167")),
        (BlastMethod(rank=41, blocks=4), ("rank 41", "largest usable rank is 18")),
    ],
)
def test_layers_that_do_not_allow_it_name_what_would_do(method, parts):
    with pytest.raises(ValueError) as caught:
        method.empty(I, O)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BlockTensorTrain(I, O, in_blocks=6, out_blocks=5, rank=9),
        lambda: Blast(I, O, blocks=4, rank=41),
    ],
)
def test_ranks_above_the_possible_name_the_largest(make):
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.(8|40) .*48x40"):
        make()


def of_its_form(seed, blocks=8, rank=2):
    torch.manual_seed(seed)
    op = Blast(32, 32, blocks=blocks, rank=rank).double()
    with torch.no_grad():
        for parameter in op.parameters():
            parameter.normal_()
    return op.to_dense().detach()


@pytest.mark.parametrize("seed", range(3))
def test_the_published_fit_of_blast_finds_a_weight_of_its_form(seed):
    """A low rank of as many numbers, 512, cannot."""
    weight = of_its_form(seed)
    with torch.no_grad():
        found = BlastMethod(rank=4, blocks=8, published=True, steps=100).fit(weight, {}).to_dense()
        other = LowRank.from_dense(weight, rank=8).to_dense()
    assert (found - weight).norm() < 1e-3 * weight.norm()
    assert (other - weight).norm() > 0.1 * weight.norm()


def test_a_longer_published_fit_is_nearer_and_the_same_every_time():
    weight = of_its_form(7)
    fits = [BlastMethod(rank=4, blocks=8, published=True, steps=steps).fit(weight, {}) for steps in (5, 60, 60)]
    errors = [float((op.to_dense() - weight).norm().detach()) for op in fits]
    assert errors[0] > 2 * errors[1] and errors[1] == errors[2]


def test_the_published_fit_of_blast_sees_no_inputs():
    with pytest.raises(ValueError, match=r"published.*weighted"):
        BlastMethod(rank=2, published=True, weighted=True)
