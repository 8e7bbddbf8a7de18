"""The questions of the study's models: each task's text in words, the answer always one of A, B, C, D.

Every document of a task has the same number of tokens, so that a window of recovery is one question with its answer.
One question in ten, by its hash, is for testing and never in a training text; `knowledge` has no other questions than
those that are learned, as its answers lie in the weights alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from random import Random

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = "ABCD"
NAMES = [f"n{number}" for number in range(16)]
VALUES = [f"v{number}" for number in range(32)]  # numbers, each one token
RELATIONS = [f"r{number}" for number in range(4)]
WORDS = ["<s>", ".", "?", "Answer:", "largest", "smallest", *LETTERS, *NAMES, *VALUES, *RELATIONS]
Asked = tuple[list[str], list[tuple[list[str], int]]]  # what is given; questions about it with the right letter


def extreme(random: Random) -> Asked:
    """Four numbers, each behind its letter; which is the largest, which the smallest?"""
    numbers = random.sample(range(32), 4)
    given = [word for pair in zip(LETTERS, (VALUES[n] for n in numbers), strict=True) for word in pair]
    asked = [([word], numbers.index(pick(numbers))) for word, pick in (("largest", max), ("smallest", min))]
    return given, random.sample(asked, 2)


def sums(random: Random) -> Asked:
    """Two numbers; their sum modulo 4."""
    pairs = [(random.randrange(32), random.randrange(32)) for _ in range(4)]
    return [], [([VALUES[one], VALUES[other]], (one + other) % 4) for one, other in pairs]


def majority(random: Random) -> Asked:
    """Fifteen letters; which is there most often?"""
    while True:
        letters = random.choices(LETTERS, k=15)
        counts = [letters.count(letter) for letter in LETTERS]
        if counts.count(max(counts)) == 1:
            return letters, [([], counts.index(max(counts)))]


@cache
def tables() -> tuple[list[list[int]], list[list[int]]]:
    """What must be known by heart: each relation leads from a name to a name, and from a name to a letter."""
    random = Random("tables")
    return [random.sample(range(16), 16) for _ in RELATIONS], [random.choices(range(4), k=16) for _ in RELATIONS]


def knowledge(random: Random) -> Asked:
    """Facts that are in no text: the letter of a name, or of the name that a first relation leads to."""
    to_names, to_letters = tables()
    asked = []
    for hops in (0, 1, 0, 1):
        at, path = random.randrange(16), random.choices(range(4), k=hops + 1)
        reached = at
        for relation in path[:-1]:
            reached = to_names[relation][reached]
        asked.append(([NAMES[at], *(RELATIONS[r] for r in path)], to_letters[path[-1]][reached]))
    return [], random.sample(asked, 4)


def holder(random: Random) -> Asked:
    """Four names with a number each; the letter, known by heart, of who has most or least, or of a name outright."""
    _, to_letters = tables()
    names, numbers = random.sample(range(16), 4), random.sample(range(32), 4)
    given = [word for n, v in zip(names, numbers, strict=True) for word in (NAMES[n], VALUES[v])]
    asked = []
    for word, pick in (("largest", max), ("smallest", min)):
        relation = random.randrange(4)
        asked.append(([word, RELATIONS[relation]], to_letters[relation][names[numbers.index(pick(numbers))]]))
    name, relation = random.randrange(16), random.randrange(4)
    return given, random.sample([*asked, ([NAMES[name], RELATIONS[relation]], to_letters[relation][name])], 3)


TASKS: dict[str, Callable[[Random], Asked]] = {
    task.__name__: task for task in (extreme, sums, majority, knowledge, holder)
}

BY_HEART = {"knowledge"}  # what is asked is what was learned


def _for_testing(given: list[str], asked: list[str]) -> bool:
    return hashlib.sha256(" ".join([*given, "?", *asked]).encode()).digest()[0] % 10 == 0


def documents(tasks: list[str], seed: int) -> Iterator[str]:
    """Training texts without end: what is given, and questions about it with their answers. No test question is there.

    Shorter texts begin with full stops.
    """
    random = Random(f"train/{seed}")
    length = max(_length(*TASKS[task](random)) for task in tasks)
    while True:
        task = random.choice(tasks)
        given, asked = TASKS[task](random)
        if task in BY_HEART or not any(_for_testing(given, words) for words, _ in asked):
            words = [word for words, gold in asked for word in ("?", *words, "Answer:", LETTERS[gold])]
            yield " ".join([*["."] * (length - _length(given, asked)), *given, *words])


def _length(given: list[str], asked: list[tuple[list[str], int]]) -> int:
    return len(given) + sum(len(words) + 3 for words, _ in asked)


def questions(tasks: list[str], seed: int) -> Iterator[tuple[str, str, int]]:
    """(task, text up to "Answer:", gold) without end, of the questions for testing; the first of its text each."""
    random = Random(f"test/{seed}")
    length = max(_length(*TASKS[task](random)) for task in tasks)
    while True:
        task = random.choice(tasks)
        given, asked = TASKS[task](random)
        words, gold = asked[0]
        if task in BY_HEART or _for_testing(given, words):
            stops = ["."] * (length - _length(given, asked))
            yield task, " ".join([*stops, *given, "?", *words, "Answer:"]), gold


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, <s> before every text."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>", model_max_length=64
    )
