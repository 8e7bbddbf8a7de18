"""KL from the dense model is what its definition says, whatever the windows and batches."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tensormix.evaluate import kl_divergence
from tensormix.evaluate.divergence import divergences


class Table(nn.Module):
    """Predicts the next token from the last one alone: logits[last]."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, ids):
        return SimpleNamespace(logits=self.get_buffer("logits")[ids])


def random(seed, vocabulary=31):
    return torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IDS = torch.randint(31, (47,), generator=torch.Generator().manual_seed(5))


def by_definition(dense, compressed, contexts):
    """One token at a time, one probability at a time."""
    total = 0.0
    for last in contexts:
        p, q = dense[last].softmax(0).tolist(), compressed[last].softmax(0).tolist()
        total += math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return total / len(contexts)


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (47, 47)])
def test_equals_the_direct_computation(window, stride, bos):
    dense, other = random(1), random(2)
    contexts = []
    for place in range(len(IDS)):
        begin = next(b for b in range(0, len(IDS), stride) if b <= place < b + window)
        context = ([] if bos is None else [bos]) + IDS[begin:place].tolist()
        contexts += context[-1:]
    wanted = by_definition(dense, other, contexts)
    how = {"window": window, "stride": stride, "text": "t", "bos_id": bos}
    for batch_size in (1, 3):
        row = kl_divergence(Table(other), Table(dense), IDS, batch_size=batch_size, **how)
        assert row["value"] == pytest.approx(wanted, rel=1e-10)
        assert row["num_tokens"] == len(contexts) and row["kind"] == "kl"
    assert kl_divergence(Table(dense), Table(other), IDS, **how)["value"] != pytest.approx(wanted, rel=1e-3)


def test_a_model_does_not_diverge_from_itself_and_a_small_change_counts_squared():
    dense = random(1)
    step = 1e-5 * random(3)
    p = dense[3].softmax(0)
    second_order = 0.5 * float((p * step[3].square()).sum() - (p * step[3]).sum().square())
    assert float(divergences(dense[3], dense[3])) == 0
    assert float(divergences(dense[3], dense[3] + step[3])) == pytest.approx(second_order, rel=1e-3)


def test_a_large_text_is_cut_into_pieces_that_change_nothing(monkeypatch):
    pair = random(1), random(2)
    whole = divergences(*pair)
    monkeypatch.setattr("tensormix.evaluate.divergence._CELLS", 70)  # two rows at a time
    assert torch.equal(divergences(*pair), whole)


def test_tokens_that_both_rule_out_cost_nothing_and_one_that_only_the_second_does_costs_all():
    dense, other = random(1)[0], random(2)[0]
    dense[4] = -torch.inf
    finite = divergences(dense, other)
    assert torch.isfinite(finite).all()
    other[4] = -torch.inf
    assert torch.isfinite(divergences(dense, other)).all()
    other[5] = -torch.inf
    assert torch.isposinf(divergences(dense, other)).all()


def test_what_cannot_be_compared_is_said():
    how = {"window": 8, "stride": 8, "text": "t"}
    with pytest.raises(ValueError, match=r"KL on 't': the vocabularies of the two models differ \(40 and 31 tokens\)"):
        kl_divergence(Table(random(1, 40)), Table(random(1)), IDS, **how)
    broken = copy.deepcopy(random(1))
    broken[int(IDS[9])] = torch.nan
    with pytest.raises(ValueError, match=r"KL on 't': logits are NaN in tokens"):
        kl_divergence(Table(broken), Table(random(1)), IDS, **how)
    with pytest.raises(ValueError, match=r"stride must be in 1\.\.8"):
        kl_divergence(Table(random(1)), Table(random(1)), IDS, window=8, stride=9, text="t")
