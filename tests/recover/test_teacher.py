"""What is kept of the teacher's logits: made once, whole or absent, and refused where it speaks of something else."""

import pytest
import torch
from torch.nn import functional as F

from tensormix.recover.losses import keep
from tensormix.recover.teacher import TeacherLogits
from tensormix.recover.trainer import TaughtWindows


def logits_of(ids):
    return F.one_hot(ids, 50).float() * 5 + torch.arange(50) / 50


def cache(folder, **changes):
    about = {"teacher": "t", "tokenizer": "k", "vocabulary": 50, "top_k": 4, "tail_samples": 3, "window": 6}
    return TeacherLogits(folder, **about | changes)


WINDOWS = torch.randint(0, 50, (150, 6), generator=torch.Generator().manual_seed(0))


def test_logits_are_kept_once_and_serve_every_run_that_reads_these_windows(tmp_path):
    calls = []

    def counted(ids):
        calls.append(len(ids))
        return logits_of(ids)

    cache(tmp_path).fill(WINDOWS.__getitem__, range(0, 100), 150, counted, 50)
    assert sum(calls) == 128  # whole files
    cache(tmp_path).fill(WINDOWS.__getitem__, range(20, 90), 150, counted, 50)
    assert sum(calls) == 128
    again = cache(tmp_path)
    again.fill(WINDOWS.__getitem__, range(100, 150), 150, counted, 50)
    assert sum(calls) == 150
    wanted, found = keep(logits_of(WINDOWS[131])[:-1], 4, 3, seed=131), again[131]
    assert found.keys() == {f"teacher_{name}" for name in wanted._fields}
    for name, value in wanted._asdict().items():
        assert torch.equal(found[f"teacher_{name}"], value)


def test_a_longer_run_adds_what_a_shorter_one_left_out_of_its_last_file(tmp_path):
    for num_windows in (20, 40):
        kept = cache(tmp_path)
        kept.fill(WINDOWS.__getitem__, range(num_windows), num_windows, logits_of, 8)
    assert torch.equal(kept[30]["teacher_tokens"], keep(logits_of(WINDOWS[30])[:-1], 4, 3, seed=30).tokens)


def test_a_window_carries_what_the_teacher_said_about_that_window():
    mixture = [{"input_ids": number} for number in range(10)]
    logits = [{"teacher_tokens": number} for number in range(10)]
    dataset = TaughtWindows(mixture, logits, first=3, num_taught=4)
    items = [dataset[index] for index in range(len(dataset))]
    assert [item["input_ids"] for item in items] == list(range(3, 10))
    assert [item.get("teacher_tokens") for item in items] == [3, 4, 5, 6, None, None, None]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher": "u"}, r"kept for another teacher \(t, this run has u\); name another folder as distill\.cache"),
        ({"tokenizer": "l"}, r"kept for another tokenizer \(k, this run has l\)"),
        ({"top_k": 5}, r"kept for another top_k \(4, this run has 5\)"),
    ],
)
def test_logits_of_another_teacher_or_tokenizer_are_refused(tmp_path, changes, sentence):
    cache(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        cache(tmp_path, **changes)


def test_logits_of_other_windows_are_refused(tmp_path):
    cache(tmp_path).fill(WINDOWS.__getitem__, range(64), 64, logits_of, 64)
    with pytest.raises(ValueError, match=r"were kept for other windows \(another text, seed, mixture or loss_on\)"):
        cache(tmp_path).fill(lambda number: WINDOWS[number + 1], range(64), 64, logits_of, 64)


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the teacher's logits hold NaN or infinite values"):
        cache(tmp_path).fill(WINDOWS.__getitem__, range(64), 64, lambda ids: logits_of(ids) / 0, 64)
