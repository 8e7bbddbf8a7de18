"""How much worse a changed model predicts a text: against the formulas, and on few tokens."""

import pytest
import torch
from torch.nn import functional as F

from budget_plans import save_varied_llama
from plans import one_rule
from tensormix.allocation import allocate
from tensormix.allocation.rises import Rises, first_tokens
from tensormix.evaluate.divergence import divergences
from tensormix.methods import ZeroMethod
from tensormix.settings import Budget
from tensormix.sites import blocks
from zoo import make, token_ids

BATCHES = [token_ids(rows=2, length=12, seed=1), token_ids(rows=1, length=7, seed=2)]


def logits(model):
    with torch.no_grad():
        return [model(batch).logits for batch in BATCHES]


def losses(model):
    return torch.cat(
        [
            F.cross_entropy(one[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            for one, batch in zip(logits(model), BATCHES, strict=True)
        ]
    )


@pytest.mark.parametrize("measure", ["kl", "loss"])
def test_the_mean_over_tokens_and_its_standard_error(measure):
    model, other = make("llama").eval(), make("llama").eval()
    rises, before, first = Rises(model, BATCHES, measure), logits(model), losses(model)
    with torch.no_grad():
        for one in (model, other):
            blocks(one)[2].mlp.down_proj.weight.mul_(0.5)
    pairs = zip(before, logits(model), strict=True)
    each = torch.cat([divergences(a, b) for a, b in pairs]) if measure == "kl" else losses(model) - first
    found = rises.at(2)
    assert found.mean == pytest.approx(float(each.mean()), rel=1e-3)
    assert found.error == pytest.approx(float(each.std()) / len(each) ** 0.5, rel=1e-3)
    assert rises.of(other) == found == rises.at(0), "a copy that is changed as much, run whole"


def test_nothing_changed_is_nothing_lost():
    rises = Rises(make("gpt2").eval(), BATCHES, "kl")
    assert rises.at(3) == (0.0, 0.0)


def test_the_first_tokens_are_whole_sequences_but_for_the_last():
    found = first_tokens(BATCHES, 18)
    assert [tuple(batch.shape) for batch in found] == [(1, 12), (1, 6)]
    assert torch.equal(torch.cat([batch[0] for batch in found]), torch.cat([*BATCHES[0]])[:18])
    assert [batch.shape[1] for batch in first_tokens(BATCHES, 25)] == [12, 12], "one token alone predicts nothing"
    assert sum(batch.numel() for batch in first_tokens(BATCHES, 1000)) == 31


def test_sensitivity_looks_at_as_many_tokens_as_the_budget_says(tmp_path):
    folder, plan = save_varied_llama(tmp_path), one_rule(ZeroMethod(), sites=["down"])

    def importances(tokens, batches):
        found = allocate(folder, plan, Budget(keep=0.5, by="sensitivity", tokens=tokens), batches)
        return {row["site"]: (row["importance"], row["importance_error"]) for row in found.rows[1:]}

    few, many = importances(12, BATCHES), importances(512, BATCHES)
    assert few == importances(512, [BATCHES[0][:1]]) != many
    assert all(error > 0 for _, error in many.values())
