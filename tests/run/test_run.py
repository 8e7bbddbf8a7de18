"""A run does each stage once, goes on where it was stopped, and repeats what a change touches and nothing else."""

import json
import shutil

import pytest
import torch

from tensormix.models import load_model
from tensormix.recipe import Recipe
from tensormix.run import STAGES, run_recipe, stage_keys, stage_rows
from tensormix.run import stages as run_module
from tensormix.storage.files import read_json


def recipe(tiny, **changes):
    data = {
        "model": str(tiny),
        "plan": [{"blocks": "last 2", "method": {"name": "mixt", "num_branches": 3}}],
        "recover": {"steps": 3, "batch_size": 2, "window": 32, "text": [{"exam": True}]},
        "evaluate": {
            "exam": {"num_questions": 16, "shots": 1},
            "perplexity": [{"text": {"facts": True}, "window": 64, "stride": 64, "num_tokens": 256}],
        },
        "diagnose": {"num_prompts": 8},
        "profile": {"tokens": [1, 8], "repeats": 2},
    }
    return Recipe.model_validate(data | changes)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    return run_recipe(recipe(tiny), tmp_path_factory.mktemp("run"))


def times(folder):
    files = [*folder.glob("*.json"), *(folder / "dense").glob("*.json")]
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in files if f.name != "recipe.json"}


def test_every_stage_leaves_rows_with_settings_and_environment(finished):
    assert not (finished / "allocate.json").exists()  # nothing to decide without a budget
    for stage in (name for name in STAGES[1:] if name not in ("reparameterise", "direct")):  # which were not asked for
        content = read_json(finished / f"{stage}.json")
        assert content["rows"]
        assert content["environment"]["versions"]["torch"]
        assert content["seed"] == 0
        names = {"stage", "key", "settings", "seed", "texts", "rows", "environment", "seconds", "finished"}
        assert set(content) == names
    assert Recipe.model_validate(read_json(finished / "recipe.json")).plan.root[0].blocks == "last 2"


def test_the_rows_are_those_of_the_saved_model(finished):
    import tensormix.hf  # noqa: F401

    model = load_model(str(finished / "recovered"), dtype="float32")
    resources = {row["model"]: row for row in stage_rows(finished, "profile") if row["kind"] == "resources"}
    assert resources["compressed"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert resources["dense"]["parameters"] > resources["compressed"]["parameters"]


def test_the_dense_reference_is_measured_beside(finished):
    kinds = {row["kind"] for row in stage_rows(finished / "dense", "evaluate")}
    assert kinds == {"accuracy", "answer", "perplexity"}
    assert not (finished / "dense" / "compress.json").exists()
    drift = [row for row in stage_rows(finished, "diagnose") if row["kind"] == "drift_mean"]
    assert {row["region"] for row in drift} == {"all", "output"}
    assert all(row["value"] > 0 for row in drift)


def test_nothing_is_done_twice(finished, tiny):
    before = times(finished)
    run_recipe(recipe(tiny), finished)
    assert times(finished) == before


def test_a_change_repeats_what_it_touches_and_nothing_else(finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = times(tmp_path)
    run_recipe(recipe(tiny, profile={"tokens": [2], "repeats": 2}), tmp_path)
    changed = {name for name, when in times(tmp_path).items() if when != before[name]}
    assert changed == {"profile.json"}
    before = times(tmp_path)
    changes = {"recover": {"steps": 4, "batch_size": 2, "window": 32, "text": [{"exam": True}]}}
    run_recipe(recipe(tiny, profile={"tokens": [2], "repeats": 2}, **changes), tmp_path)
    changed = {name for name, when in times(tmp_path).items() if when != before[name]}
    assert changed == {"recover.json", "evaluate.json", "diagnose.json", "profile.json"}


@pytest.mark.parametrize("stopped", ["recover", "evaluate", "diagnose"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(finished, tiny, tmp_path, monkeypatch, stopped):
    names = {"recover": "recover", "evaluate": "evaluate_rows", "diagnose": "diagnose_rows"}

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, names[stopped], killed)
        # the reference of the dense model is evaluated and diagnosed as well: give the finished one
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(tiny), tmp_path, reference=finished / "dense")
    assert (tmp_path / "compress.json").exists() and not (tmp_path / f"{stopped}.json").exists()
    run_recipe(recipe(tiny), tmp_path, reference=finished / "dense")
    for stage in ("evaluate", "diagnose"):
        assert stage_rows(tmp_path, stage) == stage_rows(finished, stage)


def test_the_saved_model_is_the_one_that_was_measured(finished):
    """Measured again from the folder, the answers are the same to the bit."""
    import tensormix.hf  # noqa: F401
    from tensormix.evaluate import evaluate_choices, exam_prompts
    from tensormix.models import load_tokenizer
    from tensormix.settings import Exam

    model, tokenizer = (
        load_model(str(finished / "recovered"), dtype="float32"),
        load_tokenizer(str(finished / "recovered")),
    )
    rows = evaluate_choices(model, tokenizer, exam_prompts(Exam(num_questions=16, shots=1)), batch_size=32)
    assert [row for row in rows if row["kind"] == "answer"] == [
        row for row in stage_rows(finished, "evaluate") if row["kind"] == "answer"
    ]


def test_a_null_baseline_runs_the_same_way(tiny, tmp_path, finished):
    for name in ("zero", "drop_blocks"):
        plan = [{"blocks": "last 2", "method": {"name": name}}]
        folder = run_recipe(recipe(tiny, plan=plan), tmp_path / name, reference=finished / "dense")
        assert stage_rows(folder, "profile")
    answers = [
        [row["logits"] for row in stage_rows(tmp_path / name, "evaluate") if row["kind"] == "answer"]
        for name in ("zero", "drop_blocks")
    ]
    # a block whose linear layers are all zero passes its input on, as one that is not there
    torch.testing.assert_close(torch.tensor(answers[0]), torch.tensor(answers[1]))


def test_a_changed_model_folder_is_noticed(tiny, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    before = stage_keys(recipe(copy), None)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    after = stage_keys(recipe(copy), None)
    assert all(before[stage] != after[stage] for stage in before)


def test_the_diagnostics_that_a_recipe_names(tiny, tmp_path):
    named = ["residual_stream", "drop_sensitivity", {"name": "spectra", "stop": 1.0, "blocks": [0]},
             "compress_sensitivity", "spectral_gap"]  # fmt: skip
    asked = {"run": named, "text": {"facts": True}, "num_windows": 2, "window": 32}
    made = recipe(tiny, diagnose=asked, evaluate={"exam": None}, recover=None, profile=None)
    run_recipe(made, tmp_path)
    own, dense = ({row["kind"] for row in stage_rows(folder, "diagnose")} for folder in (tmp_path, tmp_path / "dense"))
    assert own == {"residual", "residual_last", "sensitivity", "spectral_gap"} and dense == {"sensitivity", "spectrum"}
    rows = stage_rows(tmp_path, "diagnose")
    assert [row["block"] for row in rows if row["kind"] == "residual_last"] == [3]
    assert {row["block"] for row in rows if row["kind"] == "spectral_gap"} == {2, 3}
    dropped = [row for row in stage_rows(tmp_path / "dense", "diagnose") if row["kind"] == "sensitivity"]
    compressed = [row for row in rows if row["kind"] == "sensitivity"]
    for one, other in zip(dropped, compressed, strict=True):  # every block, on the same text of the same dense model
        assert one["block"] == other["block"] and one["whole_loss"] == pytest.approx(other["whole_loss"])
        assert one["change"] == "drop" and other["change"] == "compress" and other["loss"] != other["whole_loss"]
