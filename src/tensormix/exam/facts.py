"""The same knowledge in plain sentences: a text for training and for perplexity, free of licences."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tensormix.exam.words import CATEGORIES, DAYS, LETTERS, MONTHS, OPPOSITES


def sum_sentence(random: Random) -> str:
    left, right = random.randint(1, 20), random.randint(1, 20)
    return f"{left} + {right} = {left + right}."


def difference_sentence(random: Random) -> str:
    right, answer = random.randint(1, 20), random.randint(0, 20)
    return f"{right + answer} - {right} = {answer}."


def sequence_sentence(random: Random) -> str:
    start, step = random.randint(1, 30), random.randint(1, 6)
    shown = [start + step * k for k in range(6)]
    return ", ".join(map(str, shown if random.random() < 0.5 else shown[::-1])) + "."


def order_sentence(random: Random) -> str:
    cycle = random.choice((DAYS, MONTHS, LETTERS))
    at = random.randrange(len(cycle) - 1)
    earlier, later = cycle[at], cycle[at + 1]
    return (
        f"{later} comes right after {earlier}." if random.random() < 0.5 else f"{earlier} comes right before {later}."
    )


def opposite_sentence(random: Random) -> str:
    pair = list(random.choice(OPPOSITES))
    random.shuffle(pair)
    return f"The opposite of {pair[0]} is {pair[1]}."


def category_sentence(random: Random) -> str:
    kind = random.choice(sorted(CATEGORIES))
    member = random.choice(CATEGORIES[kind])
    return f"{member.capitalize()} is {'an' if kind[0] in 'aeiou' else 'a'} {kind}."


def comparison_sentence(random: Random) -> str:
    small, large = sorted(random.sample(range(1, 100), 2))
    return f"{large} is larger than {small}." if random.random() < 0.5 else f"{small} is smaller than {large}."


SENTENCES = (
    sum_sentence,
    difference_sentence,
    sequence_sentence,
    order_sentence,
    opposite_sentence,
    category_sentence,
    comparison_sentence,
)


def facts(seed: int, sentences: int = 20) -> Iterator[str]:
    """Paragraphs of `sentences` true sentences each, without end; the same seed gives the same paragraphs."""
    random = Random(f"facts/{seed}")
    while True:
        yield " ".join(random.choice(SENTENCES)(random) for _ in range(sentences))
