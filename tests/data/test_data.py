"""Windows of tokens: nothing lost, nothing doubled, the same for the same seed."""

import copy
import json
from itertools import islice

import pytest
import torch
from transformers import ByT5Tokenizer

from tensormix.data import (
    IGNORED,
    Document,
    Mixture,
    calibration_batches,
    encode,
    pack,
    packed_source,
    read_documents,
)
from tensormix.settings import Source


def texts_of(path, **settings):
    return [document.text for document in read_documents(Source(file=str(path), **settings))]


def test_every_kind_of_file_gives_its_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "a.json").write_text(json.dumps([" one ", "two"]))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"question": "one", "answer": "two"}\n')
    assert texts_of(tmp_path / "a.txt") == ["one\n\ntwo"]
    assert texts_of(tmp_path / "a.json") == ["one", "two"]
    assert texts_of(tmp_path / "a.jsonl") == ["one", "two"]
    assert texts_of(tmp_path / "b.jsonl", field="question+answer") == ["one\n\ntwo"]


def test_what_is_skipped_and_what_is_taken_are_disjoint_parts_of_a_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["one", "two", "three", "four"]))
    assert texts_of(path, num_documents=2) + texts_of(path, skip_documents=2) == texts_of(path)
    assert texts_of(path, skip_documents=1, num_documents=2) == ["two", "three"]
    with pytest.raises(ValueError, match=r"a\.json holds no text after its first 4 documents\."):
        packed_source(ByT5Tokenizer(), Source(file=str(path), skip_documents=4))
    with pytest.raises(ValueError, match="skip_documents belongs to a file or to the Hub; of what is generated take"):
        Source(exam=True, skip_documents=1)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.doc", "x", r"unknown kind '\.doc'; known: \.txt, .*\.json, \.jsonl"),
        ("a.jsonl", '{"text": "x"}\n{"text"', r"a\.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", '{"body": "x"}', r"item 1 of .*a\.jsonl has no text field 'text'; it has: body"),
        ("a.json", '{"body": "x"}', r"item 1 of .*a\.json has no text field 'text'; it has: body"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        texts_of(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*absent\.txt"):
        texts_of(tmp_path / "absent.txt")


def test_an_unreachable_data_set_is_one_sentence(monkeypatch):
    import datasets

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"the dataset 'some/set' cannot be read from the Hub or its cache: no route$"):
        next(iter(read_documents(Source(hub="some/set"))))


def test_an_empty_source_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json holds no text"):
        packed_source(tokenizer, Source(file=str(tmp_path / "a.json")))


def test_packing_puts_one_separator_before_each_document(tokenizer):
    ids, counted = pack(tokenizer, map(Document, ["3 + 4 = 7.", "", "The opposite of hot is cold."]))
    assert counted is None
    assert (ids == tokenizer.bos_token_id).sum() == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3 + 4 = 7.The opposite of hot is cold."


def test_only_the_answers_count_when_asked(tokenizer):
    document = next(read_documents(Source(exam=True), answers_only=True))
    ids, counted = encode(tokenizer, document)
    assert ids == encode(tokenizer, Document(document.text))[0]
    answers = [tokenizer.decode([token]) for token, counts in zip(ids, counted, strict=True) if counts]
    assert answers == [" " + line[-1] for line in document.text.split("\n") if line.startswith("Answer:")]


def make(tokenizer, *sources, num_windows=12, seed=0, window=16, **settings):
    return Mixture(tokenizer, sources, window=window, num_windows=num_windows, seed=seed, **settings)


def same(one, other):
    return all(torch.equal(one[i]["input_ids"], other[i]["input_ids"]) for i in range(len(one)))


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(" ".join(f"word{n}" for n in range(100)))
    return Source(file=str(path))


def test_windows_depend_on_the_seed_alone(tokenizer, story):
    for sources in ([story], [Source(exam=True)], [Source(facts=True), story]):
        assert same(make(tokenizer, *sources), make(tokenizer, *sources))
        assert not same(make(tokenizer, *sources), make(tokenizer, *sources, seed=1))


def test_more_windows_begin_with_the_same_ones(tokenizer, story):
    few, many = make(tokenizer, story, Source(exam=True)), make(tokenizer, story, Source(exam=True), num_windows=30)
    assert same(few, many)


def test_every_window_of_a_text_is_used_once_before_any_is_used_again(tokenizer, story):
    whole = packed_source(tokenizer, story)
    count = len(whole) // 16
    drawn = make(tokenizer, story, num_windows=2 * count)
    expected = sorted(map(tuple, whole[: count * 16].view(-1, 16).tolist()))
    for start in (0, count):
        assert sorted(tuple(drawn[start + i]["input_ids"].tolist()) for i in range(count)) == expected


def test_weights_are_shares_of_the_windows(tokenizer, story):
    heavy = Source(exam=True, weight=3.0)
    mixture = make(tokenizer, story, heavy, num_windows=2000)
    assert 0.71 < sum(mixture.chosen) / 2000 < 0.79  # 0.75 and 4 standard deviations


def test_a_text_shorter_than_one_window_is_refused(tokenizer, story):
    with pytest.raises(ValueError, match=r"story\.txt has \d+ tokens, shorter than one window of 5000; the largest"):
        make(tokenizer, story, window=5000)


def test_answers_only_leaves_other_sources_whole(tokenizer, story):
    mixture = make(tokenizer, story, Source(exam=True), num_windows=20, window=64, answers_only=True)
    for index, source in enumerate(mixture.chosen):
        labels = mixture[index]["labels"]
        assert (labels == IGNORED).any() == (source == 1)


@pytest.mark.parametrize("answers_only", [False, True])
def test_labels_are_the_tokens_themselves_and_none_is_a_separator(tokenizer, answers_only):
    for window in make(tokenizer, Source(exam=True), Source(facts=True), window=96, answers_only=answers_only):
        ids, labels = window["input_ids"], window["labels"]
        assert ids[0] == tokenizer.bos_token_id and (labels[ids == ids[0]] == IGNORED).all()
        assert ((labels == ids) | (labels == IGNORED)).all()


def test_calibration_batches_are_windows(tokenizer, story):
    batches = calibration_batches(tokenizer, story, num_windows=3, window=8, seed=0)
    assert [batch.shape for batch in batches] == [(1, 8)] * 3
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 3


def test_the_exam_never_ends(tokenizer):
    assert len(list(islice(read_documents(Source(exam=True)), 700))) == 700


def test_an_exam_whose_answers_fit_into_no_window_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"no answer of the exam lies in a window of 8 tokens, .*; take a longer"):
        make(tokenizer, Source(exam=True), window=8, answers_only=True)


def test_the_last_of_several_fields_is_the_answer_and_the_separator_that_ends_it_counts(tmp_path, tokenizer):
    lines = [{"q": "hot?", "more": "say it", "a": "cold"}, {"q": "up?", "more": "", "a": "down"}, {"q": "x", "a": ""}]
    (tmp_path / "a.json").write_text(json.dumps([{"more": ""} | line for line in lines]))
    asking = Source(file=str(tmp_path / "a.json"), field="q+more+a")
    found = list(read_documents(asking, answers_only=True))
    assert [[d.text[start:stop] for start, stop in d.answers or ()] for d in found] == [["cold"], ["down"], []]
    ids, counted = pack(tokenizer, found)
    assert torch.equal(ids, packed_source(tokenizer, asking))
    assert tokenizer.decode(ids[counted]) == "cold<s>down<s>"  # <s> is the EOS token, too


def test_a_separator_that_ends_nothing_does_not_count(tokenizer):
    begins = copy.deepcopy(tokenizer)
    begins.add_special_tokens({"eos_token": "</s>"})
    answers = [Document("hot? cold", ((5, 9),)), Document("up? down", ((4, 8),))]
    ids, counted = pack(begins, answers)
    assert begins.decode(ids[counted]) == " cold down"
    whole, marks = pack(begins, [answers[0], Document("prose")])
    assert begins.decode(whole[marks]) == " cold<s>prose"  # of prose everything counts


def test_a_field_alone_asks_nothing(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text(json.dumps(["prose", {"text": "more"}]))
    found = list(read_documents(Source(file=str(tmp_path / "a.json")), answers_only=True))
    assert found == [Document("prose"), Document("more")]


def test_a_tokenizer_that_does_not_know_its_characters_is_refused():
    with pytest.raises(ValueError, match=r"says which characters each token holds, and ByT5Tokenizer does not; take"):
        encode(ByT5Tokenizer(), Document("hot? cold", ((5, 9),)))
