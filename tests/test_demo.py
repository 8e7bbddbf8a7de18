"""The embedded model is what the README says it is, and its sweep can be read."""

import json
from pathlib import Path

import pytest

from tensormix.demo import sweep_file
from tensormix.evaluate import evaluate_choices, exam_prompts
from tensormix.models import load_model, load_tokenizer
from tensormix.recipe import Baselines, Sweep
from tensormix.recipe.sweep import Depths
from tensormix.report import build_report
from tensormix.run import stage_rows
from tensormix.settings import Exam
from tensormix.sweep.depths import run_sweep

SHARED = Path(__file__).parents[2] / "shared" / "data"
MODEL = sweep_file().parent / "model"


def test_it_is_small_deep_and_free_of_pickles():
    files = list(MODEL.iterdir())
    assert sum(file.stat().st_size for file in files) < 6_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja"}
    config = json.loads((MODEL / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["num_hidden_layers"] >= 12


def test_it_answers_85_percent_of_questions_it_never_saw():
    model, tokenizer = load_model(str(MODEL), dtype="float32"), load_tokenizer(str(MODEL))
    rows = evaluate_choices(model, tokenizer, exam_prompts(Exam(num_questions=200, seed=2)), batch_size=50)
    overall = next(row for row in rows if row.get("subject") == "all")
    assert overall["value"] >= 0.85


def test_its_sweep_scans_every_depth():
    sweep = Sweep.load(sweep_file())
    assert sweep.recipe is not None and Path(sweep.recipe.model) == MODEL
    cells = sweep.cells(12)
    assert [cell.depth for cell in cells if cell.direction == "last" and cell.method.name == "mixt"] == list(
        range(1, 13)
    )
    assert {cell.method.name for cell in cells} == {"mixt", "zero", "drop_blocks"}
    assert any(cell.direction == "first" for cell in cells)
    assert {"last-04-mixt4", "first-02-mixt4", "last-06-zero", "last-07-drop_blocks"} <= {cell.name for cell in cells}


def test_its_sweep_ends_with_a_table_and_a_page_although_depths_are_lost(tmp_path):
    """The demo's own file with few depths, steps and questions, and a learning rate at which every recovery fails."""
    sweep = Sweep.load(sweep_file())
    recipe = sweep.recipe
    assert recipe is not None and recipe.recover is not None and recipe.evaluate.exam is not None
    assert recipe.diagnose is not None
    few = {"exam": recipe.evaluate.exam.model_copy(update={"num_questions": 8, "shots": 1})}
    few["perplexity"] = tuple(p.model_copy(update={"num_tokens": 256}) for p in recipe.evaluate.perplexity)
    lost = {"steps": 5, "batch_size": 2, "learning_rate": 0.1}
    recipe = recipe.model_copy(
        update={
            "recover": recipe.recover.model_copy(update=lost),
            "evaluate": recipe.evaluate.model_copy(update=few),
            "diagnose": recipe.diagnose.model_copy(update={"num_prompts": 4}),
            "profile": None,
        }
    )
    directions = {"last": Depths(depths=(1,)), "first": Depths(depths=(1,))}
    baselines = Baselines(methods=("drop_blocks",), depths=(1,))
    run_sweep(sweep.model_copy(update={"recipe": recipe, "directions": directions, "baselines": baselines}), tmp_path)
    table = json.loads((tmp_path / "sweep.json").read_text())
    assert [cell["cell"] for cell in table["cells"]] == [
        "dense",
        "last-01-mixt4",
        "first-01-mixt4",
        "last-01-drop_blocks",
    ]
    for name in (cell["folder"] for cell in table["cells"][1:]):
        losses = [row["loss"] for row in stage_rows(tmp_path / name, "recover") if row["kind"] == "loss"]
        assert len(losses) == 5 and min(losses[2:]) > min(losses[:2]) + 2  # lost for good, and not stopped
        assert any(row["kind"] == "accuracy" for row in stage_rows(tmp_path / name, "evaluate"))
        assert stage_rows(tmp_path / name, "diagnose")
    page = build_report([tmp_path]).read_text(encoding="utf-8")
    assert "drop_blocks" in page


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
