"""As many at a time as the memory holds and as pay; what is measured does not depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormix.evaluate import ChoicePrompt, evaluate_choices, kl_divergence, perplexity
from tensormix.evaluate.batches import START, TRIALS, BatchSize
from tensormix.exam import exam, prompt


class Machine:
    """Works on up to `memory` items at once; a call takes `start` seconds, and one for every `lanes` items."""

    def __init__(self, memory: int, lanes: int = 1, start: float = 0.0) -> None:
        self.memory, self.lanes, self.start = memory, lanes, start
        self.time, self.tried = 0.0, list[int]()

    def __call__(self, piece: Sequence[int], size: int) -> list[int]:
        assert 1 <= len(piece) <= size
        self.tried.append(size)
        if len(piece) > self.memory:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        self.time += self.start + -(-len(piece) // self.lanes)
        return [10 * item for item in piece]


@settings(max_examples=30, deadline=None)  # each lack of memory collects garbage
@given(st.integers(0, 300), st.integers(1, 100), st.sampled_from([1, 7, 64]), st.sampled_from([1, 5, 128, "auto"]))
def test_every_item_is_worked_on_once_and_in_order(num: int, memory: int, lanes: int, asked: Any) -> None:
    machine, items = Machine(memory, lanes), list(range(num))
    size = BatchSize(asked, clock=lambda: machine.time)
    pieces = list(size.each(items, machine))
    assert [item for piece, _ in pieces for item in piece] == items
    assert [value for _, values in pieces for value in values] == [10 * item for item in items]
    assert asked == "auto" or max(machine.tried, default=0) <= asked  # a number is never exceeded


def test_it_grows_to_the_memory_and_never_asks_for_too_much_again() -> None:
    machine = Machine(memory=300, lanes=10**6)  # more at a time is always faster
    size = BatchSize("auto", clock=lambda: machine.time)
    list(size.each(range(10_000), machine))
    assert size.size == 256 and machine.tried.count(512) == 1
    assert machine.tried[: 3 * TRIALS + 1] == [32, 32, 64, 64, 128, 128, 256]


def test_it_stops_where_more_at_a_time_is_no_faster() -> None:
    machine = Machine(memory=10**9, lanes=128)
    size = BatchSize("auto", clock=lambda: machine.time)
    list(size.each(range(20_000), machine))
    assert size.size == 128 and machine.tried.count(256) == TRIALS and 512 not in machine.tried


def test_a_call_that_costs_much_to_begin_pays_for_more_at_a_time() -> None:
    sizes = []
    for start in (0.0, 1000.0):
        machine = Machine(memory=10**9, start=start)
        size = BatchSize("auto", clock=lambda machine=machine: machine.time)
        list(size.each(range(100_000), machine))
        sizes.append(size.size)
    assert sizes[0] == START and 4096 <= sizes[1] <= 16384  # work / (start + work) gains 10 % up to about 4 to 9 starts


def test_longer_items_are_more_work() -> None:
    """The last items are short: a hundred of them in a second are no sign that the larger number pays."""
    lengths = [1000] * 64 + [1] * 2000
    machine = Machine(memory=10**9)

    def work(piece: Sequence[int], size: int) -> None:
        machine.tried.append(size)
        machine.time += sum(piece)

    size = BatchSize("auto", clock=lambda: machine.time)
    list(size.each(lengths, work, cost=sum))
    assert size.size == START
    size = BatchSize("auto", clock=lambda: machine.time)
    list(size.each(lengths, work))  # by the number of items it is misled
    assert size.size > START


def test_memory_that_does_not_suffice_for_one_and_other_errors() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        list(BatchSize(4).each([1, 2], Machine(memory=0)))
    for error in (RuntimeError("another"), ValueError("can't allocate memory")):
        with pytest.raises(type(error)):
            list(BatchSize(4).each([1], lambda piece, size, error=error: (_ for _ in ()).throw(error)))


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    from tensormix.models import load_model

    return load_model(tiny, dtype="float32")


@pytest.fixture
def small_memory(model: Any) -> Any:
    """The model with a memory of 700 tokens; the largest number of tokens that it has read at once."""
    read = [0]

    def check(module: Any, args: Any, kwargs: Any) -> None:
        tokens = (args[0] if args else kwargs["input_ids"]).numel()
        if tokens > 700:
            raise torch.OutOfMemoryError("CUDA out of memory")
        read[0] = max(read[0], tokens)

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    yield read
    handle.remove()


def same(rows: Any, others: Any) -> None:
    """Equal but for the rounding of sums."""
    for row, other in zip(rows, others, strict=True):
        for key, value in row.items():
            if key in ("logits", "value", "loss"):
                assert value == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
            else:
                assert value == other[key], key


@pytest.mark.parametrize("asked", [1, 3, 64, "auto"])
def test_what_is_measured_does_not_depend_on_it(
    model: Any, tokenizer: Any, asked: Any, request: pytest.FixtureRequest
) -> None:
    prompts = [ChoicePrompt(id=q.id, subject=q.subject, text=prompt(q, ()), gold=q.gold) for q in exam(24, 0)]
    ids = torch.randint(5, 200, (900,), generator=torch.Generator().manual_seed(0))
    text: dict[str, Any] = {"window": 32, "stride": 16, "text": "t"}
    other = type(model)(model.config).eval()

    def measure(batch_size: Any) -> list[Any]:
        answers = evaluate_choices(model, tokenizer, prompts, batch_size=batch_size)
        divergence = kl_divergence(other, model, ids, batch_size=batch_size, **text)
        return [*answers, perplexity(model, ids, batch_size=batch_size, **text), divergence]

    whole = measure(7)
    read = request.getfixturevalue("small_memory")
    same(measure(asked), whole)
    assert 0 < read[0] <= 700
