"""On a real language model: what was chosen among methods loses no more than the best plan of any of them."""

from pathlib import Path

import pytest

from plans import one_rule
from tensormix.allocation import allocate
from tensormix.allocation.rises import Rises
from tensormix.compression import compress
from tensormix.data import packed_source
from tensormix.models import load_model, load_tokenizer
from tensormix.settings import Budget, Source

DATA = Path(__file__).parents[3] / "shared" / "data"
MODEL, TEXT = DATA / "models" / "stories260K", DATA / "text" / "tinystories_1000.json"
pytestmark = pytest.mark.skipif(not MODEL.exists() or not TEXT.exists(), reason="shared/data has no stories260K")
AMONG = [{"name": "flat_llm"}, {"name": "narrow"}, {"name": "zero"}]


def test_what_was_chosen_loses_no_more_than_the_best_of_any_method():
    ids = packed_source(load_tokenizer(MODEL), Source(file=str(TEXT), num_documents=40))[: 16 * 128].view(16, 128)
    plan = one_rule({"name": "auto", "among": AMONG, "keeps": [0.6, 0.9], "tokens": 256})
    found = allocate(MODEL, plan, Budget(keep=0.8, of="parameters"), ids)
    plans = {row["contender"]: row for row in found.rows if row["kind"] == "contender"}
    assert {"auto", "flat_llm", "narrow", "zero"} <= set(plans)
    predicted = [row["predicted"] for row in plans.values() if row["predicted"] is not None]
    assert plans["auto"]["predicted"] == min(predicted) and found.rows[0]["achieved_keep"] <= 0.8
    rises = Rises(load_model(MODEL), [*ids[12:].split(1)], "kl", from_blocks=False)
    losses = {}
    for name, plan in {"chosen": found.plan, **found.others}.items():
        model = load_model(MODEL)
        compress(model, plan, [*ids[:12].split(1)])
        losses[name] = rises.of(model).mean
        if name in plans:
            assert losses[name] == pytest.approx(plans[name]["measured"], rel=1e-4)
    assert losses["chosen"] == min(losses.values()) < 1
