"""On a real language model: a short recovery helps, and the dense model stays where it is. `make real` runs it."""

import os
from pathlib import Path

import pytest
import torch

from tensormix.compression import compress
from tensormix.data import calibration_batches, packed_source
from tensormix.evaluate import perplexity
from tensormix.models import load_model, load_tokenizer
from tensormix.plan import Plan
from tensormix.recover import recover
from tensormix.settings import Recover, Source

MODEL = os.environ.get("TENSORMIX_REAL")
DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MODEL is None, reason="TENSORMIX_REAL names no folder of SmolLM2-135M-Instruct (make real)"),
    pytest.mark.skipif(not DATA.exists(), reason="the texts of shared/data are not there"),
]
PLAN = Plan.model_validate([{"blocks": "all", "method": {"name": "narrow", "keep": 0.8}}])


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def recovered(model, tokenizer, folder, **changes):
    files = ("prose_openstax_biology", "instruct_dolly", "code_stdlib")
    chats = {"instruct_dolly": "messages"}
    text = [Source(file=str(DATA / "recovery" / f"{name}.jsonl"), chat=chats.get(name)) for name in files]
    usual = {"text": text, "loss": "kl", "steps": 20, "batch_size": 2, "window": 256}
    rows = recover(model, tokenizer, Recover(**usual | changes), folder=folder, seed=0, teacher=MODEL)
    return [row["loss"] for row in rows if row["kind"] == "held_out"], rows[-1]


def of_c4(model, tokenizer):
    ids = packed_source(tokenizer, Source(file=str(DATA / "text" / "c4_300.jsonl"), num_documents=20))[:4096]
    return perplexity(model, token_ids=ids, window=512, stride=512, bos_id=None, text="c4")["value"]


def test_a_short_recovery_helps_on_the_text_it_reads_and_on_text_it_does_not(tokenizer, tmp_path):
    model = load_model(MODEL, dtype="float32")
    text = Source(file=str(DATA / "text" / "c4_300.jsonl"), skip_documents=150)
    compress(model, PLAN, calibration_batches(tokenizer, text, num_windows=8, window=512, seed=0))
    before = of_c4(model, tokenizer)
    losses, kept = recovered(model, tokenizer, tmp_path / "c")
    assert losses[-1] < losses[0] and kept["loss"] == min(losses)
    assert of_c4(model, tokenizer) < before


def test_the_dense_model_stays_where_it_is(tokenizer, tmp_path):
    model = load_model(MODEL, dtype="float32")
    before = of_c4(model, tokenizer)
    losses, _ = recovered(model, tokenizer, tmp_path / "c", steps=6)
    assert max(losses) < 0.01
    assert of_c4(model, tokenizer) == pytest.approx(before, rel=0.01)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
