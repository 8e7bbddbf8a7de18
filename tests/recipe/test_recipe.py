"""Recipes: what is read, and what is said about a slip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recipe_files import FULL, load
from tensormix.methods import Mixt
from tensormix.plan import Plan
from tensormix.recipe import MixtureFile, Recipe, Sweep
from tensormix.recipe.comparison import Comparison
from tensormix.settings import Evaluate, Perplexity, Profile, Source


def test_a_full_recipe(tmp_path):
    recipe = load(tmp_path, FULL)
    assert recipe.plan.root[0].method == Mixt(num_branches=3)
    assert recipe.recover.learning_rate == 1e-3 and recipe.recover.batch_size == 16
    assert recipe.evaluate.exam.shots == 5 and recipe.evaluate.perplexity[0].bos
    assert recipe.recover.text[1] == Source(exam=True)


def test_only_the_model_is_required(tmp_path):
    recipe = load(tmp_path, "model: owner/name")
    assert recipe == Recipe(model="owner/name")
    assert recipe.plan == Plan() and recipe.recover is None and recipe.evaluate == Evaluate()


def test_a_mixture_file_stands_for_its_sources_placed_beside_it(tmp_path):
    (tmp_path / "mixtures").mkdir()
    file = tmp_path / "mixtures" / "talk.yaml"
    file.write_text(
        "sources:\n  - {file: a.jsonl, weight: 3, chat: {user: q, assistant: a}}\n  - {exam: true, weight: 0.2}\n"
    )
    recipe = load(tmp_path, "model: owner/name\nrecover: {text: mixtures/talk.yaml}")
    first, second = recipe.recover.text
    assert (first.file, first.weight) == (str(tmp_path / "mixtures" / "a.jsonl"), 3)
    assert first.chat == {"user": "q", "assistant": "a"}
    assert second == Source(exam=True, weight=0.2)
    assert MixtureFile.load(file).sources == recipe.recover.text
    file.write_text("sources: [{file: a.jsonl, wieght: 3}]")
    with pytest.raises(ValueError, match=r"mixture\.sources\[0\]: unknown key 'wieght', did you mean 'weight'"):
        load(tmp_path, "model: owner/name\nrecover: {text: mixtures/talk.yaml}")
    with pytest.raises(ValueError, match=r"there is no file .*none\.yaml"):
        load(tmp_path, "model: owner/name\nrecover: {text: none.yaml}")


def test_the_teacher_and_its_cache_are_placed_beside_the_recipe(tmp_path):
    (tmp_path / "dense").mkdir()
    start = "model: owner/name\nrecover: {text: [{exam: true}], loss: kl, distill: "
    distill = load(tmp_path, start + "{teacher: dense, cache: kept}}").recover.distill
    assert (distill.teacher, distill.cache) == (str(tmp_path / "dense"), str(tmp_path / "kept"))
    assert load(tmp_path, start + "{teacher: owner/dense}}").recover.distill.teacher == "owner/dense"


def test_paths_are_relative_to_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "recipe.yaml").write_text(FULL)
    recipe = Recipe.load("sub/recipe.yaml")
    assert Path(recipe.model) == tmp_path / "sub" / "model"
    assert Path(recipe.calibration.text.file) == tmp_path / "sub" / "data" / "a.txt"
    assert Path(recipe.recover.text[0].file) == tmp_path / "sub" / "data" / "a.txt"


def test_a_folder_is_taken_before_a_hub_id(tmp_path):
    assert load(tmp_path, "model: owner/name").model == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert Path(load(tmp_path, "model: owner/name").model) == tmp_path / "owner" / "name"


def test_absolute_paths_stay(tmp_path):
    assert load(tmp_path, "model: /somewhere/else").model == "/somewhere/else"


M = "model: m\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            M + "plan: [{method: {name: mixt, num_branch: 2}}]",
            "recipe.plan[0].method: unknown key 'num_branch', did you mean 'num_branches'? "
            "Known: name, num_branches, bond, bonds, padding, init, seed, tolerance, max_steps, precision, ridge. "
            "(1 more error.)",
        ),
        (M + "recovr: {}", "recipe: unknown key 'recovr', did you mean 'recover'? Known: model, start, seed, "),
        (M + "zzz: {}", "recipe: unknown key 'zzz'. Known: model, "),
        (M + "plan: [{metod: {name: zero}}]", "recipe.plan[0]: unknown key 'metod', did you mean 'method'?"),
        (
            M + "plan: [{method: {name: mixxt}}]",
            "recipe.plan[0].method: unknown name 'mixxt', did you mean 'mixt'? Known: mixt, svd, zero, mean_output, ",
        ),
        (M + "plan: [{method: {keep: 0.5}}]", "recipe.plan[0].method: missing 'name', which says which one is meant"),
        (M + "plan: [{method: zero}]", "recipe.plan[0].method: must be keys and values, got 'zero'."),
        (M + "plan: {method: zero}", "recipe.plan: must be a list, got {'method': 'zero'}."),
        (M + "plan: [{method: {name: svd}}]", "recipe.plan[0].method: missing 'keep'. Known: name, keep."),
        (
            M + "plan: [{method: {name: svd, keep: 1.5}}]",
            "recipe.plan[0].method.keep: input should be less than or equal to 1, got 1.5.",
        ),
        (
            M + "plan: [{method: {name: zero}}, {sites: [gat], method: {name: zero}}]",
            "recipe.plan[1].sites: unknown role 'gat', did you mean 'gate'? Known roles: ",
        ),
        (M + "plan: [{blocks: lst 3, method: {name: zero}}]", "recipe.plan[0].blocks: blocks 'lst 3' cannot be read"),
        (
            M + "recover: {step: 3, text: [{exam: true}]}",
            "recipe.recover: unknown key 'step', did you mean 'steps'? Known: text, steps, ",
        ),
        (
            M + "recover: {steps: -3, text: [{exam: true}]}",
            "recipe.recover.steps: input should be greater than or equal to 1, got -3.",
        ),
        (
            M + "recover: {steps: 3, text: []}",
            "recipe.recover.text: tuple should have at least 1 item after validation, not 0, got [].",
        ),
        (
            M + "recover: {steps: 3, text: [{fil: a.txt}]}",
            "recipe.recover.text[0]: unknown key 'fil', did you mean 'file'? Known: file, hub, config, split, exam, "
            "facts, field, chat, weight, skip_documents, num_documents, seed.",
        ),
        (
            M + "recover: {steps: 3, text: [{exam: true}, {file: a.txt, exam: true}]}",
            "recipe.recover.text[1]: a source of text is exactly one of file, hub, exam and facts, got file and exam.",
        ),
        (
            M + "recover: {steps: 3, loss_on: answer, text: [{exam: true}]}",
            "recipe.recover.loss_on: must be 'all' or 'answers', got 'answer', did you mean 'answers'?",
        ),
        (
            M + "diagnose: {run: [spectra, supr_weights]}",
            "recipe.diagnose.run[1]: unknown name 'supr_weights', did you mean 'super_weights'? Known: residual_stre",
        ),
        (
            M + "diagnose: {run: [{name: spectra, stp: 0.5}]}",
            "recipe.diagnose.run[0]: unknown key 'stp', did you mean 'stop'? Known: name, start, stop, blocks.",
        ),
        ("seed: 1", "recipe: missing 'model'. Known: model, start, seed, "),
        (M + "dtype: fp32", "recipe.dtype: must be 'auto', 'float32', "),
        (
            M + "evaluate: {perplexity: [{text: {exam: true}, window: 4, stride: 8}]}",
            "recipe.evaluate.perplexity[0]: stride must be at most window (4), or tokens are left out; got 8.",
        ),
        (M + "evaluate: {exam: {shot: 1}}", "recipe.evaluate.exam: unknown key 'shot', did you mean 'shots'?"),
        (M + "profile: {tokens: [0]}", "recipe.profile: tokens must be at least 1, got 0."),
        (
            M + "plan: [{method: {name: mean_output}}]",
            "recipe: the method mean_output needs calibration, and there is no such section.",
        ),
    ],
)
def test_slips(tmp_path, text, sentence):
    with pytest.raises(ValueError) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(sentence)


def test_a_key_that_is_there_twice(tmp_path):
    with pytest.raises(ValueError, match=r"recipe.yaml cannot be read as YAML: the key 'model' is there twice"):
        load(tmp_path, M + M)


def test_no_yaml(tmp_path):
    with pytest.raises(ValueError, match=r"recipe.yaml cannot be read as YAML: while parsing"):
        load(tmp_path, "a: [")


@pytest.mark.parametrize(("verb", "more"), [("sweep", "vary: {num_branches: [4]}"), ("compare", "budgets: [0.5]")])
def test_a_file_of_many_runs_names_its_verb(tmp_path, verb, more):
    with pytest.raises(ValueError, match=f"tensormix {verb}"):
        load(tmp_path, f"recipe: {{model: owner/name}}\n{more}")


@pytest.mark.parametrize("kind", [Sweep, Comparison])
def test_a_recipe_is_no_file_of_many_runs(tmp_path, kind):
    (tmp_path / "one.yaml").write_text("model: owner/name\nplan: []")
    with pytest.raises(ValueError, match=r"one recipe.*tensormix run"):
        kind.load(tmp_path / "one.yaml")


def test_no_mapping(tmp_path):
    with pytest.raises(ValueError, match=r"recipe.yaml must hold keys and values, got list"):
        load(tmp_path, "- a")


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*nothing.yaml"):
        Recipe.load(tmp_path / "nothing.yaml")


def test_nothing_can_be_changed():
    recipe = Recipe(model="m")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1


def test_unknown_keys_are_refused_on_construction():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Recipe(model="m", sed=1)


@pytest.mark.parametrize(("fields", "got"), [({}, "none of them"), ({"hub": "a/b", "facts": True}, "hub and facts")])
def test_a_source_is_exactly_one(fields, got):
    with pytest.raises(ValidationError, match=f"exactly one of file, hub, exam and facts, got {got}"):
        Source(**fields)


def test_split_belongs_to_the_hub():
    with pytest.raises(ValidationError, match="config and split belong to a hub source"):
        Source(file="a.txt", split="test")


def test_defaults_are_valid():
    assert Perplexity(text=Source(facts=True)).stride == Profile().tokens[0] * 512


def test_a_recipe_survives_json(tmp_path):
    recipe = load(tmp_path, FULL)
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe


def test_the_digest_follows_the_content():
    one = Recipe.model_validate({"model": "m", "plan": [{"blocks": [1, 2], "method": {"name": "zero"}}]})
    same = Recipe.model_validate({"plan": [{"method": {"name": "zero"}, "blocks": "1,2"}], "model": "m", "seed": 0})
    assert one.digest == same.digest and len(one.digest) == 12
    assert one.digest == Recipe.model_validate(json.loads(one.model_dump_json())).digest


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 5), st.integers(0, 5), st.sampled_from(["float32", "bfloat16"]))
def test_different_recipes_have_different_digests(seed, other, dtype):
    one, two = Recipe(model="m", seed=seed), Recipe(model="m", seed=other, dtype=dtype)
    assert (one.digest == two.digest) == (one == two)


def test_the_schema_for_editors():
    schema = json.dumps(Recipe.model_json_schema())
    assert all(word in schema for word in ("num_branches", "drop_blocks", "learning_rate", "perplexity"))
    assert "baselines" in json.dumps(Sweep.model_json_schema())
