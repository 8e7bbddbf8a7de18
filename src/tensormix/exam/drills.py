"""Finding things again: lists of choices and of holdings, asked many times. What a small model must learn first.

An exam question asks for two things at once: the answer, and the letter that stands before it. Drills ask for the
second alone, several times per list, so that the circuit for it forms early in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tensormix.exam.questions import LETTERS
from tensormix.exam.words import CATEGORIES, DAYS, MONTHS, OPPOSITES, PEOPLE

WORDS = (
    *(word for pair in OPPOSITES for word in pair),
    *(member for members in CATEGORIES.values() for member in members),
    *DAYS,
    *MONTHS,
)


def choice_drill(random: Random, queries: int) -> str:
    """Four choices, then some of them with their letter, as a solved question puts it."""
    words = random.random() < 0.5
    choices = random.sample(WORDS, 4) if words else [str(n) for n in random.sample(range(100), 4)]
    shown = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    asked = (random.randrange(4) for _ in range(queries))
    return shown + "".join(f"\nSolution: {choices[k]}, choice {LETTERS[k]}" for k in asked)


def holding_drill(random: Random, queries: int) -> str:
    """Who has how many, then some of it again."""
    held: dict[str, int] = dict(zip(random.sample(PEOPLE, 4), random.sample(range(1, 100), 4), strict=True))
    asked = (random.choice(list(held)) for _ in range(queries))
    return ", ".join(f"{who} has {n}" for who, n in held.items()) + "." + "".join(f" {w} has {held[w]}." for w in asked)


def drills(seed: int, queries: int = 8) -> Iterator[str]:
    """Drills without end, each with `queries` things to find again; the same seed gives the same drills."""
    random = Random(f"drills/{seed}")
    while True:
        drill = choice_drill if random.random() < 0.7 else holding_drill
        yield "\n" + drill(random, queries)
