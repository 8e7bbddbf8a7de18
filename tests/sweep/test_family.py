"""A sweep with other dense models of the family: their trend, and its cells beside it."""

import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tensormix.recipe import Sweep
from tensormix.report import build_report
from tensormix.run import stage_rows
from tensormix.storage.files import read_json
from tensormix.sweep.depths import run_sweep


def test_the_trend_and_the_cells_beside_it(tiny, tmp_path):
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(tiny)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2] if config.layer_types else None
    small = AutoModelForCausalLM.from_config(config)
    small.save_pretrained(tmp_path / "models" / "small")
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "models" / "small")
    text = [{"text": {"facts": True}, "window": 32, "stride": 32, "num_tokens": 128}]
    exam = {"num_questions": 4, "shots": 0}  # the other models of a family are asked for their loss alone
    recipe = {"model": str(tiny), "evaluate": {"exam": exam, "perplexity": text}, "diagnose": None,
              "profile": {"tokens": [1], "repeats": 1}}  # fmt: skip
    asked = {
        "recipe": recipe,
        "vary": {"num_branches": [2]},
        "depths": [1, 2],
        "family": [str(tmp_path / "models" / "small")],
    }
    folder = run_sweep(Sweep.model_validate(asked), tmp_path / "sweep")
    rows = [row for row in read_json(folder / "sweep.json")["boundary"] if row["kind"] == "scaling"]
    assert [(row["family"], row["model"]) for row in rows] == [
        ("dense", tiny.name), ("dense", "small"), ("compressed", "last-01-mixt2"), ("compressed", "last-02-mixt2")
    ]  # fmt: skip
    assert rows[1]["parameters"] == sum(p.numel() for p in small.parameters()) < rows[0]["parameters"]
    for row, where in zip(rows, ("dense", "family/small", "last-01-mixt2", "last-02-mixt2"), strict=True):
        (of_text,) = [r for r in stage_rows(folder / where, "evaluate") if r["kind"] == "perplexity"]
        assert row["loss"] == of_text["loss"]
    assert [r["kind"] for r in stage_rows(folder / "family" / "small", "evaluate")] == ["perplexity"]
    assert [row["residual"] for row in rows[:2]] == pytest.approx([0, 0], abs=1e-9)  # two models fix the trend
    assert rows[3]["parameters"] < rows[2]["parameters"] < rows[0]["parameters"]
    assert 'id="scaling"' in build_report([folder]).read_text(encoding="utf-8")


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="family: the trend is of the loss of a text, and evaluate"):
        Sweep.model_validate({"recipe": {"model": "m"}, "family": ["other"]})
    text = [{"text": {"facts": True}}]
    with pytest.raises(ValueError, match="family: the models must differ in their last names, got other, other"):
        Sweep.model_validate(
            {"recipe": {"model": "m", "evaluate": {"perplexity": text}}, "family": ["a/other", "b/other"]}
        )
    (tmp_path / "small").mkdir()
    (tmp_path / "sweep.yaml").write_text(
        "recipe: {model: m, evaluate: {perplexity: [{text: {facts: true}}]}}\nfamily: [small, owner/name]"
    )
    assert Sweep.load(tmp_path / "sweep.yaml").family == (str(tmp_path / "small"), "owner/name")
