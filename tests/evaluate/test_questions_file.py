"""Questions of one's own: asked as they stand by everything that asks the exam, and refused in one sentence."""

import json

import pytest

from tensormix.allocation.laser_search import scorer
from tensormix.evaluate import exam_prompts, read_prompts
from tensormix.recipe import Sweep
from tensormix.settings import Evaluate, Exam
from tensormix.storage.files import read_json
from tensormix.sweep.depths import run_sweep
from tensormix.sweep.predict import predict

ROWS = [{"text": f"Is it {n}?\nAnswer:", "gold": n % 4, "subject": "odd" if n % 2 else "even"} for n in range(12)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return path


def test_the_first_questions_of_the_file_are_asked_as_they_stand(file):
    prompts = exam_prompts(Exam(file=str(file), num_questions=5))
    assert [(p.text, p.gold, p.subject) for p in prompts] == [tuple(row.values()) for row in ROWS[:5]]
    file.write_text('{"text": "Answer:", "gold": 3}')
    assert read_prompts(str(file), 1)[0].subject == "own"


def test_a_search_divides_them_and_refuses_too_few(file):
    def divided(num_questions):
        return scorer(None, Evaluate(exam=Exam(file=str(file), num_questions=num_questions)), 0.4)[1]

    assert divided(7) == {"exam": {"file": str(file), "first": 7, "num_questions": 5}}
    with pytest.raises(ValueError) as refused:
        divided(9)
    assert str(refused.value) == (
        f"search: {file} has 12 questions, of which evaluate.exam asks 9, and the search needs 6 others; the largest "
        "possible num_questions is 7"
    )


def test_a_sweep_bisects_and_is_predicted_by_them(tiny, file, tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        f"recipe: {{model: {tiny}, evaluate: {{exam: {{file: mine.jsonl, num_questions: 12}}}}, diagnose: null, "
        "profile: null, recover: {text: [{exam: true}], window: 32, steps: 1, batch_size: 1}}\n"
        "vary: {num_branches: [2]}\nsearch: bisect\n"
    )
    sweep = Sweep.load(tmp_path / "sweep.yaml")
    run_sweep(sweep, tmp_path / "run")
    rows = read_json(tmp_path / "run" / "last-04-mixt2" / "evaluate.json")["rows"]
    assert [row["gold"] for row in rows if row["kind"] == "answer"] == [row["gold"] for row in ROWS]
    assert {row["subject"] for row in rows if row["kind"] == "accuracy"} == {"all", "odd", "even"}
    said = [row for row in predict(sweep, num_prompts=4, local_tokens=64) if row["kind"] == "prediction"]
    assert said[-1]["signal"] == "all"
    with pytest.raises(ValueError, match=r"13 questions were asked for, .*mine\.jsonl has 12; the largest possible"):
        predict(sweep, num_prompts=13)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", r"mine\.jsonl, line 2 is not valid JSON"),
        ('{"gold": 1}', r"line 2 needs 'text', the prompt up to \"Answer:\""),
        ('["text"]', r"line 2 needs 'text'"),
        ('{"text": "Answer: ", "gold": 1}', r"line 2: the text must end in \"Answer:\", it ends in 'Answer: '"),
        ('{"text": "Answer:", "gold": 4}', r"line 2: gold must be 0 to 3, .* got 4"),
        ('{"text": "Answer:", "gold": true}', "got True"),
        ('{"text": "Answer:"}', "got None"),
    ],
)
def test_a_line_that_is_no_question_is_refused(file, line, sentence):
    file.write_text('{"text": "Answer:", "gold": 0}\n' + line)
    with pytest.raises(ValueError, match=sentence):
        read_prompts(str(file), 2)


def test_a_missing_file_and_settings_of_the_built_in_exam_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*none\.jsonl; give a \.jsonl with text and gold"):
        read_prompts(str(tmp_path / "none.jsonl"), 1)
    with pytest.raises(ValueError, match="asked as they stand: leave out seed and shots"):
        Exam(file="mine.jsonl", seed=2, shots=0)
    assert Exam.model_validate(Exam(file="mine.jsonl").model_dump()).file == "mine.jsonl"
