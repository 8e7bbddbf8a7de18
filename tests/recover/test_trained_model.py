"""On a trained model: a short recovery at the rate that it bears helps; at one far too high it does no harm."""

import copy
from pathlib import Path

import pytest
import torch

import tensormix.demo
from tensormix.compression import compress
from tensormix.data import calibration_batches
from tensormix.models import load_model, load_tokenizer
from tensormix.plan import Plan
from tensormix.recover import recover
from tensormix.settings import Recover, Source

MODEL = Path(tensormix.demo.__file__).parent / "model"
PLAN = Plan.model_validate([{"blocks": "all", "method": {"name": "narrow", "keep": 0.8}}])
EXAM = Source(exam=True)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def recovered(model, tokenizer, folder, **changes):
    usual = {"text": [EXAM], "loss": "kl", "steps": 12, "batch_size": 2, "window": 160, "held_out": {"num_times": 3}}
    rows = recover(model, tokenizer, Recover(**usual | changes), folder=folder, seed=0, teacher=MODEL)
    return [row["loss"] for row in rows if row["kind"] == "held_out"], rows[0], rows[-1]


@pytest.fixture
def compressed(tokenizer):
    model = load_model(MODEL, dtype="float32")
    compress(model, PLAN, calibration_batches(tokenizer, EXAM, num_windows=4, window=160, seed=1))
    return model


def test_a_short_recovery_helps(compressed, tokenizer, tmp_path):
    losses, rate, kept = recovered(compressed, tokenizer, tmp_path / "c")
    assert losses[-1] < 0.9 * losses[0]
    assert kept["loss"] == min(losses) and rate["promised"] == pytest.approx(0.5)


def test_one_at_a_hundred_times_the_rate_would_do_harm_and_leaves_the_model_as_it_was(compressed, tokenizer, tmp_path):
    before = [parameter.detach().clone() for parameter in compressed.parameters()]
    high = 100 * recovered_rate(compressed, tokenizer, tmp_path)
    losses, rate, kept = recovered(compressed, tokenizer, tmp_path / "c", learning_rate=high, diverged=None)
    assert min(losses[1:]) > losses[0] and kept["step"] == 0
    assert all(torch.equal(one, two) for one, two in zip(compressed.parameters(), before, strict=True))
    assert f"{rate['promised']:.2g} times" in rate["said"] and "as it was before" in kept["said"]


def recovered_rate(model, tokenizer, folder):
    """What `auto` takes: asked of a copy that is thrown away."""
    return recovered(copy.deepcopy(model), tokenizer, folder / "asked", steps=1)[1]["learning_rate"]
