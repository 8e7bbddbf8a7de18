"""A search over laser sites finds what was planted, keeps the dense model where none helps, and says what it needs."""

import copy
import json
import shutil
from math import log

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from tensormix.allocation import laser_search as search_module
from tensormix.allocation.laser_search import candidates, plan_of, scorer, search_sites
from tensormix.cli.verbs import app
from tensormix.compression import compress
from tensormix.data import packed_source
from tensormix.evaluate import evaluate_choices, exam_prompts, perplexity
from tensormix.exam import exam
from tensormix.methods import Laser
from tensormix.models import load_model, load_tokenizer
from tensormix.plan import Plan, Rule
from tensormix.recipe import Recipe
from tensormix.run import run_recipe, stage_rows
from tensormix.run.check import check
from tensormix.settings import Evaluate, Exam, Search, Source
from tensormix.storage.files import read_json
from tensormix.storage.memory import available_memory
from zoo import make, token_ids

PLANTED = "model.layers.1.mlp.down_proj"
RANK, WIDTH, WORDS = 8, 32, 48
RATES = [0.125, RANK / WIDTH, 0.5]


@pytest.fixture(scope="module")
def clean():
    """A random model whose planted layer has rank 8."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=WORDS, max_position_embeddings=512, initializer_range=0.4, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        left, right = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0], torch.linalg.qr(torch.randn(64, WIDTH))[0]
        model.bases = left, right  # type: ignore[assignment]
        model.get_submodule(PLANTED).weight.copy_(6 * left[:, :RANK] @ right[:, :RANK].T)
    return model


@pytest.fixture(scope="module")
def folders(clean, tmp_path_factory):
    """The clean model, the same with noise in the low singular directions of one layer, and what the clean one says.

    The text is drawn from the clean model, so no other has a smaller expected log-loss on it.
    """
    root = tmp_path_factory.mktemp("planted")
    words = {"<s>": 0} | {f"w{number}": number for number in range(1, WORDS)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    noisy = copy.deepcopy(clean)
    left, right = clean.bases
    with torch.no_grad():
        noisy.get_submodule(PLANTED).weight.add_(5 * left[:, RANK:] @ right[:, RANK:].T)
    for name, model in (("clean", clean), ("noisy", noisy)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    torch.manual_seed(1)
    with torch.no_grad():
        ids = torch.zeros(16, 1, dtype=torch.long)
        for _ in range(32):
            logits = clean(ids).logits[:, -1].index_fill(-1, torch.tensor([0]), -torch.inf)
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
    lines = "\n".join(json.dumps({"text": " ".join(f"w{token}" for token in row[1:].tolist())}) for row in ids)
    (root / "text.jsonl").write_text(lines)
    return root


def recipe_on(root, name="noisy", **changes):
    data = {
        "model": str(root / name),
        "plan": [{"blocks": "1-2", "sites": ["up", "down"], "method": {"name": "laser"}}],
        "search": {"keep_rank": RATES, "part": 0.4},
        "evaluate": {
            "exam": None,
            "perplexity": [
                {
                    "text": {"file": str(root / "text.jsonl")},
                    "window": 33,
                    "stride": 33,
                    "bos": False,
                    "num_tokens": 297,
                }
            ],
        },
        "diagnose": None,
        "profile": None,
    }
    return Recipe.model_validate(data | changes)


@pytest.fixture(scope="module")
def found(folders, tmp_path_factory):
    return run_recipe(recipe_on(folders), tmp_path_factory.mktemp("run"))


def test_a_run_finds_the_layer_and_the_rate_of_the_planted_noise(found):
    decided = read_json(found / "allocate.json")
    assert decided["chosen"] == {PLANTED: RANK / WIDTH}
    assert decided["rows"][0]["choices"] == {} and len(decided["rows"]) == 1 + 4 * 3 + 3
    best = [row for row in decided["rows"] if row["chosen"]]
    assert [row["choices"] for row in best] == [decided["chosen"]]
    assert best[0]["log_loss"] == min(row["log_loss"] for row in decided["rows"])
    assert [(row["site"], row["parameters"]) for row in stage_rows(found, "compress")] == [(PLANTED, RANK * 96)]


def test_the_text_that_judges_is_not_the_one_that_chose_and_agrees(found, folders):
    scored = read_json(found / "allocate.json")["scored_on"]
    assert scored == {"text": {"name": "text.jsonl", "first": 297, "num_tokens": 198}}
    tokenizer, text = load_tokenizer(folders / "noisy"), Source(file=str(folders / "text.jsonl"))
    own = packed_source(tokenizer, text)[297:495]
    loss = perplexity(load_model(folders / "noisy"), own, window=33, stride=33, text="own")["loss"]
    assert read_json(found / "allocate.json")["rows"][0]["log_loss"] == pytest.approx(loss, rel=1e-6)
    row, dense = stage_rows(found, "evaluate")[0], stage_rows(found / "dense", "evaluate")[0]
    assert row["num_tokens"] == 297 - 9 and row["loss"] < dense["loss"] - 0.1
    run_recipe(recipe_on(folders, "clean", plan=[], search=None), found / "oracle")
    assert stage_rows(found / "oracle", "evaluate")[0]["loss"] == pytest.approx(row["loss"], abs=1e-4)


def test_a_finished_search_is_not_repeated_and_its_plan_can_be_run_by_hand(found, folders, monkeypatch):
    asked = recipe_on(folders)
    monkeypatch.setattr("tensormix.allocation.resolvers.search_sites", lambda *_: pytest.fail("searched again"))
    run_recipe(asked, found)
    assert Recipe.model_validate(read_json(found / "recipe.json")) == asked
    by_hand = recipe_on(folders, plan=read_json(found / "allocate.json")["plan"], search=None)
    run_recipe(by_hand, found / "again", reference=found / "dense")
    assert stage_rows(found / "again", "evaluate") == stage_rows(found, "evaluate")
    with pytest.raises(pytest.fail.Exception, match="searched again"):
        run_recipe(recipe_on(folders, search={"keep_rank": RATES[:1], "part": 0.4}), found / "other")


def test_the_dense_model_is_kept_where_nothing_helps(folders, tmp_path):
    run_recipe(recipe_on(folders, "clean", search={"keep_rank": [0.0625], "part": 0.4}), tmp_path)
    decided = read_json(tmp_path / "allocate.json")
    assert decided["chosen"] == {} and decided["plan"] == []
    assert [row["chosen"] for row in decided["rows"]] == [True] + [False] * (len(decided["rows"]) - 1)
    assert not (tmp_path / "compress.json").exists()
    assert stage_rows(tmp_path, "evaluate") == stage_rows(tmp_path / "dense", "evaluate")


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_every_trial_scores_the_model_that_compress_would_make(family):
    """Biases and fused experts included; afterwards the model is as it was."""
    model = make(family)
    ids = token_ids(seed=3)
    before = model(ids).logits

    def score(other):
        return 0.0, F.cross_entropy(other(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    plan = Plan((Rule(blocks="1,3", sites=r".*(mlp|experts|c_proj|o_proj).*", method=Laser(keep_rank=1)),))
    settings, told = Search(keep_rank=(0.3, 0.1)), []
    got = search_sites(model, plan, settings, score, lambda *step: told.append(step))
    assert torch.equal(model(ids).logits, before)
    num_pairs = len(candidates(model, plan, settings)[0])
    assert [done for done, _ in told] == [*range(1, len(got.rows) + 1)]
    assert {total for _, total in told} == {num_pairs + num_pairs // 2}
    assert any(len(row["choices"]) > 1 for row in got.rows)
    for row in got.rows:
        made = copy.deepcopy(model)
        if row["choices"]:
            compress(made, plan_of(model, plan, row["choices"]))
        assert score(made)[1] == pytest.approx(row["log_loss"], rel=1e-5)


def test_the_exam_scores_on_the_questions_behind_those_of_evaluate(tiny):
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    settings = Evaluate(exam=Exam(num_questions=12, shots=1, seed=4))
    score, scored_on = scorer(tokenizer, settings, 0.4)
    assert scored_on == {"exam": {"seed": 4, "first": 12, "num_questions": 8}}
    judging = {prompt.id for prompt in exam_prompts(settings.exam)}
    own = [p for p in exam_prompts(Exam(num_questions=20, shots=1, seed=4)) if p.id not in judging]
    assert len(own) == 8 and judging == {question.id for question in exam(20, 4)[:12]}
    rows = evaluate_choices(model, tokenizer, own, batch_size=8)
    chances = [torch.tensor(r["logits"]).softmax(0)[r["gold"]].item() for r in rows if r["kind"] == "answer"]
    accuracy, log_loss = score(model)
    assert accuracy == rows[0]["value"]
    assert log_loss == pytest.approx(-sum(map(log, chances)) / 8, rel=1e-4)


def test_a_run_with_an_exam_never_judges_by_what_it_chose_on(tiny, tmp_path, monkeypatch):
    asked = []

    def watched(model, tokenizer, prompts, **settings):
        asked.append({prompt.id for prompt in prompts})
        return evaluate_choices(model, tokenizer, prompts, **settings)

    monkeypatch.setattr(search_module, "evaluate_choices", watched)
    evaluate = {"exam": {"num_questions": 12, "shots": 1}, "batch_size": 12}
    plan = [{"blocks": "last 1", "sites": ["up", "down"], "method": {"name": "laser"}}]
    run_recipe(
        recipe_on(tmp_path, model=str(tiny), plan=plan, search={"keep_rank": [0.25]}, evaluate=evaluate), tmp_path
    )
    judged = {row["id"] for row in stage_rows(tmp_path, "evaluate") if row["kind"] == "answer"}
    decided = read_json(tmp_path / "allocate.json")
    assert len(judged) == 12 and len(asked) == len(decided["rows"]) and 3 <= len(asked) <= 4
    assert all(len(own) == 3 and not own & judged for own in asked)
    replaced = {row["site"] for row in stage_rows(tmp_path, "compress")} if decided["chosen"] else set()
    assert replaced == set(decided["chosen"])


def test_check_says_that_it_cannot_know(folders, tmp_path):
    (tmp_path / "noisy").mkdir()
    shutil.copy(folders / "noisy" / "config.json", tmp_path / "noisy")  # no weights
    asked = recipe_on(tmp_path, search={"keep_rank": [0.9, 0.25, 0.26, 0.1]})
    result = check(asked)
    assert result["assumed"] and len(result["sites"]) == 4
    assert {row["parameters"] for row in result["sites"]} == {int(0.1 * WIDTH) * 96}
    assert result["search"]["candidates"] == 8 and result["search"]["evaluations"] == 12
    assert result["search"]["left_out"][PLANTED] == [0.9, 0.26]  # too large; the same rank as 0.25
    (tmp_path / "recipe.yaml").write_text(asked.model_dump_json())
    text = " ".join(CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml")]).stdout.split())
    assert "by trying, with the whole model in memory: 8 candidates, at most 12 evaluations. It cannot be known" in text


LASER = {"method": {"name": "laser"}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"plan": []}, "a search needs a plan: its rules say which sites are tried"),
        (
            {"plan": [LASER, {"method": {"name": "svd", "keep": 0.5}}]},
            r"plan\[1\]: a search tries laser, and .* is svd",
        ),
        (
            {"plan": [{"method": {"name": "laser", "keep_rank": 0.5}}]},
            r"plan\[0\]: keep_rank=0\.5 and a search cannot both hold: search\.keep_rank has them all",
        ),
        ({"budget": {"keep": 0.5}}, "budget and search both decide the sizes of the plan: leave out one"),
        ({"start": "elsewhere"}, "a search begins with the dense model: leave out start"),
        ({"evaluate": {"exam": None}}, "scores on evaluate.exam or else on a text of evaluate.perplexity; give one"),
        (
            {"evaluate": {"exam": None, "perplexity": [{"text": {"facts": True}}]}},
            "on the tokens that evaluate.perplexity does not read: give its first text num_tokens",
        ),
        ({"search": {"keep_rank": [0.5, 1.5]}}, r"above 0 and at most 1, each once, got \[0\.5, 1\.5\]"),
        ({"search": {"keep_rank": [0.5, 0.5]}}, r"above 0 and at most 1, each once, got \[0\.5, 0\.5\]"),
        ({"search": {"keep_rank": [0.5], "part": 1}}, "less than 1"),
    ],
)
def test_slips_in_a_recipe(folders, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        recipe_on(folders, **changes)


def test_what_cannot_be_searched_is_refused_before_the_dense_model_is_measured(folders, tmp_path, monkeypatch):
    def refused(sentence, **changes):
        with pytest.raises(ValueError, match=sentence):
            run_recipe(recipe_on(folders, **changes), tmp_path)
        assert not (tmp_path / "dense").exists()

    refused(
        r"no keep_rank of \[0\.01\] can be tried at model\.layers\.1\.mlp\.up_proj: Laser: keep_rank=0\.01 leaves no",
        search={"keep_rank": [0.01]},
    )
    text = {"file": str(folders / "text.jsonl")}
    long = {"exam": None, "perplexity": [{"text": text, "window": 33, "stride": 33, "num_tokens": 500}]}
    refused(
        r"'text\.jsonl' has 528 tokens, of which evaluate\.perplexity reads 500, and the search needs 333 others; "
        r"the largest possible num_tokens is 316",
        evaluate=long,
    )
    assert recipe_on(folders, evaluate=json.loads(json.dumps(long).replace("500", "316")))
    monkeypatch.setattr(search_module, "available_memory", lambda: 1000)
    refused(r"with the whole model in memory, which takes 0\.00 GB in float32, and 0\.00 GB are free; take a smaller")


def test_the_memory_that_is_free_is_told_by_the_system():
    free = available_memory()
    if free is None:
        pytest.skip("the system has no /proc/meminfo")
    assert 1 << 20 < free < 1 << 50
