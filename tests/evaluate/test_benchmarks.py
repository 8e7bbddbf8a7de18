"""Local files give lm-eval's own prompts, character for character; what is wrong with a file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmark_files import SUBJECTS, mmlu, needs_lm_eval, official, requests, write

from tensormix.evaluate import benchmarks
from tensormix.evaluate.benchmarks import choice_prompts, questions, read_docs, silent
from tensormix.settings import Benchmark

SHARED = Path(__file__).parents[2] / "../shared/data/bench"
CHOICES = ["It's one.", 'A "second" one', "third_ one", "4 {th}"]

# (file in lm-eval, a question in the columns of the Hub, the same in those of a local file)
SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "arc_challenge": (
        "arc/arc_challenge.yaml",
        {"question": "Why  so?", "choices": {"text": CHOICES, "label": ["A", "B", "C", "D"]}, "answerKey": "C"},
        {"query": "Question: Why  so?\nAnswer:", "choices": CHOICES, "gold": 2},
    ),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        {"question_stem": "The sun is", "choices": {"text": CHOICES, "label": ["A", "B", "C", "D"]}, "answerKey": "B"},
        {"query": "Question: The sun is\nAnswer:", "choices": CHOICES, "gold": 1},
    ),
    "piqa": (
        "piqa/piqa.yaml",
        {"goal": "Open a jar.", "sol1": CHOICES[0], "sol2": CHOICES[1], "label": 1},
        {"query": "Open a jar.", "choices": CHOICES[:2], "gold": 1},
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        {"activity_label": "Cooking", "ctx_a": "He stirs.", "ctx_b": "then he", "endings": CHOICES, "label": "3"},
        {"query": "Cooking: He stirs. Then he", "choices": [f" {choice}" for choice in CHOICES], "gold": 3},
    ),
    "winogrande": (
        "winogrande/default.yaml",
        {"sentence": "The \"jar\" broke as _ was thin, it's clear.", "option1": "jar", "option2": "lid", "answer": "1"},
        {"query": "The \"jar\" broke as _ was thin, it's clear.", "choices": ["jar", "lid"], "gold": 0},
    ),
}  # fmt: skip


def local(tmp_path: Path, name: str, docs: list[dict[str, Any]], **options: Any) -> Benchmark:
    return Benchmark.model_validate({"name": name, "file": write(tmp_path / f"{name}.jsonl", docs), **options})


@needs_lm_eval
@pytest.mark.parametrize("shots", [0, 1, 5])
def test_mmlu_prompts_are_those_of_lm_eval(tmp_path: Path, shots: int) -> None:
    docs, shown = mmlu(8), mmlu(12, first=100)
    examples = write(tmp_path / "dev.jsonl", shown)
    asked, size = questions(local(tmp_path, "mmlu", docs, examples=examples, shots=shots))
    assert size == len(asked) == 8 and [item.gold for item in asked] == [doc["gold"] for doc in docs[::2] + docs[1::2]]
    for subject in SUBJECTS:
        own = [item for item in asked if item.subject == subject]
        hub, dev = (
            [
                {"question": d["query"], "choices": d["choices"], "answer": d["gold"]}
                for d in part
                if d["subject"] == subject
            ]
            for part in (docs, shown)
        )
        with silent():
            from datasets import Dataset

            parts = {"test": Dataset.from_list(hub), "dev": Dataset.from_list(dev)}
            task = official(
                f"mmlu/default/mmlu_{subject}.yaml",
                hub,
                num_fewshot=shots,
                custom_dataset=lambda parts=parts, **_: parts,
            )
            for place, item in enumerate(own):
                assert list(item.requests) == requests(task, place)
        assert own[0].requests[0][0].count("Answer:") == shots + 1 and own[0].requests[1][1] == " B"


@needs_lm_eval
def test_the_description_of_every_subject_is_that_of_lm_eval(tmp_path: Path) -> None:
    import lm_eval

    files = sorted((Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml"))
    own = yaml.safe_load((Path(benchmarks.__file__).parent / "tasks/mmlu.yaml").read_text(encoding="utf-8"))
    start, _, end = own["description"].partition("{{ subject.replace('_', ' ') }}")
    for file in files:
        subject = file.stem.removeprefix("mmlu_").replace("_", " ")
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["description"] == f"{start}{subject}{end}"
    assert len(files) == 57


@needs_lm_eval
@pytest.mark.parametrize("name", SAME)
def test_other_prompts_are_those_of_lm_eval(tmp_path: Path, name: str) -> None:
    folder, hub, own = SAME[name]
    asked, _ = questions(local(tmp_path, name, [own, own]))
    with silent():
        task = official(folder, [hub, hub])
        assert list(asked[1].requests) == requests(task, 1)
        likelihoods = [(-9.0 * (index + 1) % 7, False) for index in range(len(own["choices"]))]
        scores = [t.process_results(t.eval_docs[0], likelihoods) for t in (task, asked[0].task)]
    assert scores[0] == scores[1] and asked[0].gold == own["gold"]


@needs_lm_eval
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data/bench beside the repository")
def test_files_of_real_benchmarks_are_read() -> None:
    for name, file, size in (("arc_challenge", "arc_challenge_val", 299), ("winogrande", "winogrande_val", 1267)):
        asked, found = questions(Benchmark(name=name, file=str(SHARED / f"{file}.jsonl"), num_questions=5))
        assert found == size and len({item.id for item in asked}) == 5
    dev = [d for d in read_docs(str(SHARED / "mmlu_dev.jsonl"), "mmlu") if d["subject"] == "anatomy"]
    assert len(dev) == 5 and len(read_docs(str(SHARED / "mmlu_test.jsonl"), "mmlu")) == 14042


@needs_lm_eval
def test_a_sample_is_drawn_over_all_subjects_and_does_not_change(tmp_path: Path) -> None:
    docs = mmlu(40)
    names = [[item.id for item in questions(local(tmp_path, "mmlu", docs, shots=0, num_questions=15, seed=seed))[0]]
             for seed in (0, 0, 1)]  # fmt: skip
    assert names[0] == names[1] != names[2] and len(set(names[0])) == 15
    whole = [item.id for item in questions(local(tmp_path, "mmlu", docs, shots=0))[0]]
    assert [name for name in whole if name in names[0]] == names[0]
    assert {int(name[1:]) % 2 for name in names[0]} == {0, 1}
    prompts = choice_prompts(local(tmp_path, "mmlu", docs, shots=0, num_questions=15))
    assert [prompt.id for prompt in prompts] == names[0] and all(p.text.endswith("\nAnswer:") for p in prompts)


def test_separators_inside_a_question_do_not_end_its_line(tmp_path: Path) -> None:
    doc = {"query": "one\u2028two\x85three", "choices": ["a", "b"], "gold": 0}
    assert read_docs(write(tmp_path / "a.jsonl", [doc, doc]), "piqa")[1]["query"] == doc["query"]


GOOD = {"query": "q", "choices": ["a", "b", "c", "d"], "gold": 0, "subject": "s"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", r"mmlu: .*a\.jsonl, line 2 is not valid JSON: "),
        ('{"query": "q"}', r"line 2 needs 'choices' \(list\)"),
        (json.dumps(GOOD | {"gold": "A"}), r"line 2 needs 'gold' \(int\)"),
        (json.dumps(GOOD | {"gold": 4}), "line 2: gold is 4 of 4 choices"),
        (json.dumps(GOOD | {"choices": ["a", "b"]}), "line 2 has 2 choices; OE and PE need exactly four, named A to D"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(ValueError, match=sentence):
        read_docs(str(path), "mmlu")
    with pytest.raises(ValueError, match=r"mmlu: there is no file nowhere\.jsonl; give a \.jsonl with query, choices"):
        read_docs("nowhere.jsonl", "mmlu")


@needs_lm_eval
def test_what_is_wrong_with_what_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mmlu: there are no questions to ask: the set is empty"):
        questions(local(tmp_path, "mmlu", [], shots=0))
    with pytest.raises(ValueError, match="mmlu: 9 questions were asked for, the set has 8"):
        questions(local(tmp_path, "mmlu", mmlu(8), shots=0, num_questions=9))
    with pytest.raises(ValueError, match="mmlu: 5 worked examples were asked for, but `examples` names no file"):
        questions(local(tmp_path, "mmlu", mmlu(8)))
    examples = write(tmp_path / "dev.jsonl", mmlu(4))
    with pytest.raises(
        ValueError, match=r"mmlu: us_foreign_policy has 2 worked examples in .*dev\.jsonl, 5 were asked"
    ):
        questions(local(tmp_path, "mmlu", mmlu(8), examples=examples))
    with pytest.raises(
        ValueError, match="piqa has no four letters to choose among, so it has no token before the answ"
    ):
        choice_prompts(Benchmark(name="piqa"))


@needs_lm_eval
def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    sentence = r"piqa: lm-eval cannot read its dataset .*: no route to the Hub; offline give `file`, a \.jsonl"
    with pytest.raises(ValueError, match=sentence):
        questions(Benchmark(name="piqa"))
    docs = [{"question": "Why?", "choices": ["a", "b", "c", "d"], "answer": 2}]
    parts = dict.fromkeys(("test", "dev"), Dataset.from_list(docs * 5))
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("datasets.load_dataset", lambda path, name, **_: asked.append((path, name)) or parts)
    found, size = questions(Benchmark.model_validate("mmlu"))
    assert size == 57 * 5 and {path for path, _ in asked} == {"cais/mmlu"}
    assert len({name for _, name in asked}) == len({item.subject for item in found}) == 57
    assert found[0].requests[2] == (found[0].requests[0][0], " C") and found[0].gold == 2
    assert found[0].requests[0][0].count("Answer: C") == 5


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs lm-eval, which is not installed; install it with: pip install 'tensor"
    ):
        questions(Benchmark(name="piqa"))
