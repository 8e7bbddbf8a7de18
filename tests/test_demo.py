"""The embedded model is what the README says it is, and its sweep can be read."""

import json
from pathlib import Path

import pytest

from tensormix.demo import model_folder, sweep_file
from tensormix.evaluate import evaluate_choices
from tensormix.examine import exam_prompts
from tensormix.models import load_model, load_tokenizer
from tensormix.recipe import Sweep
from tensormix.settings import Exam

SHARED = Path(__file__).parents[2] / "shared" / "data"


def test_it_is_small_deep_and_free_of_pickles():
    files = list(model_folder().iterdir())
    assert sum(file.stat().st_size for file in files) < 6_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja"}
    config = json.loads((model_folder() / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["num_hidden_layers"] >= 12


def test_it_answers_85_percent_of_questions_it_never_saw():
    model, tokenizer = load_model(str(model_folder()), dtype="float32"), load_tokenizer(str(model_folder()))
    rows = evaluate_choices(model, tokenizer, exam_prompts(Exam(num_questions=200, seed=2)), batch_size=50)
    overall = next(row for row in rows if row.get("subject") == "all")
    assert overall["value"] >= 0.85


def test_its_sweep_scans_every_depth():
    sweep = Sweep.load(sweep_file())
    assert sweep.recipe is not None and Path(sweep.recipe.model) == model_folder()
    cells = sweep.cells(12)
    assert [cell.depth for cell in cells if cell.direction == "last" and cell.method == "mixt"] == list(range(1, 13))
    assert {cell.method for cell in cells} == {"mixt", "zero", "drop_blocks"}
    assert any(cell.direction == "first" for cell in cells)


@pytest.mark.skipif(not SHARED.exists(), reason="shared/data is not beside the checkout: no stories260K")
def test_stories260k_has_its_published_perplexity():
    """4.69 per token on packed stories, BOS between them, windows of 512; over the first 200 stories."""
    from tensormix.data import packed_source
    from tensormix.evaluate import perplexity

    sweep = Sweep.load(Path(__file__).parents[1] / "recipes" / "stories260k_mixt3_sweep.yaml")
    assert sweep.recipe is not None
    text = sweep.recipe.evaluate.perplexity[0]
    model, tokenizer = load_model(sweep.recipe.model, dtype="float32"), load_tokenizer(sweep.recipe.model)
    ids = packed_source(tokenizer, text.text)
    row = perplexity(model, ids, window=text.window, stride=text.stride, text="stories", batch_size=16)
    assert row["value"] == pytest.approx(4.69, rel=0.01)


@pytest.mark.skipif(not SHARED.exists(), reason="shared/data is not beside the checkout: no stories260K")
def test_stories260k_is_swept_over_all_its_blocks_to_a_report(tmp_path):
    """The recipe with fewer steps and a shorter text: every depth has its row, and a page comes out."""
    from tensormix.report import build_report
    from tensormix.run import stage_rows
    from tensormix.run.sweep import run_sweep

    sweep = Sweep.load(Path(__file__).parents[1] / "recipes" / "stories260k_mixt3_sweep.yaml")
    recipe = sweep.recipe
    assert recipe is not None and recipe.recover is not None
    few = tuple(source.model_copy(update={"num_documents": 20}) for source in recipe.recover.text)
    short = recipe.evaluate.perplexity[0].model_copy(update={"num_tokens": 2048, "text": few[0]})
    recipe = recipe.model_copy(
        update={
            "recover": recipe.recover.model_copy(update={"steps": 2, "batch_size": 2, "window": 64, "text": few}),
            "evaluate": recipe.evaluate.model_copy(update={"perplexity": (short,)}),
            "profile": None,
        }
    )
    one_way = {"directions": {"last": sweep.directions["last"]}, "baselines": None}
    run_sweep(sweep.model_copy(update={"recipe": recipe, **one_way}), tmp_path)
    for depth in range(1, 6):
        (row,) = stage_rows(tmp_path / f"last-0{depth}-mixt3", "evaluate")
        assert row["value"] > 4
    page = build_report([tmp_path]).read_text(encoding="utf-8")
    assert "No exam was asked of this model, so there is no accuracy and no boundary of it." in page
