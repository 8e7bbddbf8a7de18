"""Scores are lm-eval's; what is kept, resumed, left out and refused is ours."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_files import mmlu, needs_lm_eval, write

from tensormix.diagnose.entropy import answers_by_task, entropy_rows
from tensormix.evaluate import evaluate_choices, harness
from tensormix.evaluate.benchmarks import choice_prompts, questions, silent
from tensormix.evaluate.harness import ask, macro_drop_row, macro_row
from tensormix.models import load_model, load_tokenizer
from tensormix.recipe import Recipe
from tensormix.run import run_recipe, stage_rows
from tensormix.settings import Benchmark

SHARED = Path(__file__).parents[2] / "../shared/data"
pytestmark = needs_lm_eval


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load_model(tiny, dtype="float32")


@pytest.fixture(scope="module")
def lettered(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    folder = tmp_path_factory.mktemp("mmlu")
    examples = write(folder / "dev.jsonl", mmlu(4, first=100))
    asked = {"name": "mmlu", "file": write(folder / "test.jsonl", mmlu(24)), "examples": examples, "shots": 2}
    return Benchmark.model_validate(asked)


def texts(tmp_path: Path, num: int = 10) -> Benchmark:
    docs = [{**doc, "choices": [f"{c} {i}" for i, c in enumerate(doc["choices"][:2])], "gold": doc["gold"] // 2}
            for doc in mmlu(num)]  # fmt: skip
    return Benchmark(name="piqa", file=write(tmp_path / "piqa.jsonl", docs))


def answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "answer"]


def test_four_likelihoods_are_the_softmax_of_the_four_logits(model: Any, tokenizer: Any, lettered: Benchmark) -> None:
    """The other route: one pass of our own over the same prompts, without lm-eval."""
    rows = ask(model, tokenizer, lettered, batch_size=4)
    other = evaluate_choices(model, tokenizer, choice_prompts(lettered), batch_size=8, task="mmlu")
    own, ours = (torch.tensor([row["logits"] for row in answers(part)]).double() for part in (rows, other))
    torch.testing.assert_close(own.softmax(1), ours.softmax(1), rtol=1e-4, atol=1e-5)
    assert own.shape == (24, 4) and not torch.allclose(own, ours)  # log-likelihoods differ by a constant each
    entropies = [[row["value"] for row in entropy_rows(answers(part))] for part in (rows, other)]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-4)
    assert [row["subject"] for row in rows[:3]] == ["all", "us_foreign_policy", "anatomy"]
    assert rows[0] | {"shots": 2, "size": 24, "batch_size": 4, "num_questions": 24} == rows[0]


def test_accuracies_are_those_of_lm_eval(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    benchmark = texts(tmp_path)
    row = ask(model, tokenizer, benchmark, batch_size=3)[0]
    with silent():
        task = questions(benchmark)[0][0].task
        engine: Any = HFLM
        lm = engine(pretrained=model, tokenizer=tokenizer, batch_size=3)
        found = evaluate(lm, {"local": task}, bootstrap_iters=0, log_samples=False)["results"]
    (scores,) = found.values()
    assert row["value"] == scores["acc,none"] and row["acc_norm"] == scores["acc_norm,none"]
    assert 0 < row["value"] < 1 and row["low"] < row["value"] < row["high"]


def test_a_run_that_was_stopped_asks_only_the_rest(
    model: Any, tokenizer: Any, lettered: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(model, tokenizer, lettered, batch_size=2)
    asked: list[int] = []
    real = harness._likelihoods

    def killed(engine: Any, chunk: Any, batch_size: int) -> Any:
        if asked:
            raise KeyboardInterrupt
        asked.append(len(chunk))
        return real(engine, chunk, batch_size)

    journal = tmp_path / "answers" / "mmlu.jsonl"
    monkeypatch.setattr(harness, "_likelihoods", killed)
    with pytest.raises(KeyboardInterrupt):
        ask(model, tokenizer, lettered, batch_size=2, journal=journal)
    with journal.open("a") as file:
        file.write('["anatomy/3", [-1.0, ')  # cut off in the middle of a line
    asked.clear()
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(harness, "_likelihoods", lambda e, c, n: asked.append(len(c)) or real(e, c, n))
    again = ask(model, tokenizer, lettered, batch_size=2, journal=journal, progress=lambda *at: seen.append(at))
    assert sum(asked) == 24 - 16 and seen == [(24, 24)] and again == whole
    asked.clear()
    assert ask(model, tokenizer, lettered, batch_size=2, journal=journal) == whole and not asked
    other = lettered.model_copy(update={"shots": 1})  # another question, so nothing of it is answered
    ask(model, tokenizer, other, batch_size=2, journal=journal)
    assert sum(asked) == 24


def test_a_batch_that_does_not_fit_is_halved(
    model: Any, tokenizer: Any, lettered: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real, tried = ask(model, tokenizer, lettered, batch_size=2), harness._likelihoods, []

    def small_memory(engine: Any, chunk: Any, batch_size: int) -> Any:
        tried.append(batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(engine, chunk, batch_size)

    monkeypatch.setattr(harness, "_likelihoods", small_memory)
    rows = ask(model, tokenizer, lettered, batch_size=8)
    assert tried[:3] == [8, 4, 2] and rows[0]["batch_size"] == 2 and rows == whole


def test_questions_longer_than_the_context(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    docs = mmlu(8)
    docs[3]["query"] = "why " * 600
    docs[5]["query"] = "but " * 700
    file = write(tmp_path / "test.jsonl", docs)
    benchmark = Benchmark(name="mmlu", file=file, shots=0)
    with pytest.raises(ValueError, match=r"mmlu: 2 of 8 questions are longer than the 512 tokens .* 'q5' with \d+ tok"):
        ask(model, tokenizer, benchmark, batch_size=4)
    rows = ask(model, tokenizer, Benchmark(name="mmlu", file=file, shots=0, too_long="leave_out"), batch_size=4)
    (left_out,) = [row for row in rows if row["kind"] == "left_out"]
    assert left_out["value"] == 2 and left_out["ids"] == ["q3", "q5"] and left_out["longest"] > 700
    assert rows[0]["num_questions"] == 6 and {row["id"] for row in answers(rows)} & {"q3", "q5"} == set()
    all_long = write(tmp_path / "long.jsonl", docs[3:4])
    with pytest.raises(ValueError, match=r"1 of 1 questions are longer .*, and none is left"):
        ask(model, tokenizer, Benchmark(name="mmlu", file=all_long, shots=0, too_long="leave_out"), batch_size=4)


def test_likelihoods_that_are_nan(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_likelihoods", lambda e, chunk, n: [[math.nan, -1.0] for _ in chunk])
    with pytest.raises(ValueError, match="piqa: the model's likelihoods are NaN for question 'q0'"):
        ask(model, tokenizer, texts(tmp_path, 2), batch_size=4)


def test_entropies_need_four_letters(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = ask(model, tokenizer, texts(tmp_path, 4), batch_size=4)
    assert "likelihoods" in rows[-1] and answers_by_task(rows) == {}
    with pytest.raises(
        ValueError, match=r"OE and PE of piqa: .* there are none: its answers are no letters; those of no"
    ):
        answers_by_task(rows, ["piqa"])
    with pytest.raises(ValueError, match=r"OE and PE of mmlu: .* it was not asked"):
        answers_by_task(rows, ["mmlu"])


def test_the_macro_mean_and_its_drop() -> None:
    def rows(values: dict[str, float], shots: int = 0) -> list[dict[str, Any]]:
        made = [
            {"kind": "accuracy", "task": task, "subject": "all", "value": value, "shots": shots}
            for task, value in values.items()
        ]
        return made + macro_row(made)

    own, dense = rows({"piqa": 0.5, "hellaswag": 0.3}), rows({"piqa": 0.7, "hellaswag": 0.4})
    assert own[-1]["value"] == pytest.approx(0.4) and own[-1]["tasks"] == ["piqa", "hellaswag"]
    assert macro_drop_row(own, dense)[0]["value"] == pytest.approx(15)  # percentage points
    assert macro_drop_row(own, []) == [] and macro_row(rows({"piqa": 0.5})) == []
    assert len(rows({"hellaswag": 0.5, "piqa": 0.5}, shots=5)) == 2  # few-shot accuracies are not averaged
    assert len(rows({"mmlu": 0.5, "piqa": 0.5})) == 2  # nor is MMLU, whatever it was shown
    with pytest.raises(ValueError, match="this model was asked piqa, hellaswag and the dense reference piqa, winogr"):
        macro_drop_row(own, rows({"piqa": 0.7, "winogrande": 0.4}))


def test_a_run_with_benchmarks(tiny: Path, lettered: Benchmark, tmp_path: Path) -> None:
    """Without the exam, entropies and geometry are taken on MMLU."""
    other = texts(tmp_path)
    arc = [{"query": "Why?", "choices": ["so", "thus", "no"], "gold": 1}]
    third = Benchmark(name="arc_challenge", file=write(tmp_path / "arc.jsonl", arc))
    asked = [json.loads(item.model_dump_json()) for item in (lettered, other, third)]
    recipe = Recipe.model_validate(
        {
            "model": str(tiny),
            "plan": [{"blocks": "last 2", "method": {"name": "zero"}}],
            "evaluate": {"exam": None, "benchmarks": asked},
            "diagnose": {"num_prompts": 6},
            "profile": None,
        }
    )
    run_recipe(recipe, tmp_path / "run")
    rows = stage_rows(tmp_path / "run", "diagnose")
    kinds = {row["kind"]: row for row in rows}
    assert kinds["output_entropy"]["task"] == "mmlu" and kinds["prompts"]["num_prompts"] == 6
    assert kinds["macro_drop"]["tasks"] == ["piqa", "arc_challenge"] and kinds["drift_mean"]["value"] > 0
    own, dense = (stage_rows(folder, "evaluate") for folder in (tmp_path / "run", tmp_path / "run/dense"))
    means = [row["value"] for part in (dense, own) for row in part if row["kind"] == "macro_accuracy"]
    assert kinds["macro_drop"]["value"] == pytest.approx(100 * (means[0] - means[1]))
    assert not (tmp_path / "run/answers").exists()


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data beside the repository")
def test_a_small_real_model_is_at_chance() -> None:
    """stories260K reads 512 tokens and splits ' A' in two: MMLU can be asked of it, its entropies cannot be taken."""
    folder = SHARED / "models/stories260K"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    bench = SHARED / "bench"
    asked = {"name": "mmlu", "file": str(bench / "mmlu_val.jsonl"), "shots": 0, "num_questions": 40}
    rows = ask(model, tokenizer, Benchmark.model_validate(asked | {"too_long": "leave_out"}), batch_size=16)
    out = sum(row["value"] for row in rows if row["kind"] == "left_out")
    assert rows[0]["num_questions"] + out == 40 and rows[0]["size"] == 1531
    assert rows[0]["low"] < 0.25 < rows[0]["high"]
    with pytest.raises(
        ValueError, match=r"OE and PE of mmlu: .* the answer ' A' must be one token after 'Answer:', but"
    ):
        answers_by_task(rows, ["mmlu"])
    arc = Benchmark(name="arc_challenge", file=str(bench / "arc_challenge_val.jsonl"), num_questions=40)
    row = ask(model, tokenizer, arc, batch_size=16)[0]
    assert row["low"] < 0.25 < row["high"] and row["num_questions"] == 40 and row["size"] == 299
