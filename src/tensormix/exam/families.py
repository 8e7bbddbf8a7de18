"""How each kind of question is made: from a random generator to (stem, right answer, three wrong ones).

Wrong answers are near misses, so that a model must know the answer and not only its size or kind.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tensormix.exam.words import CATEGORIES, DAYS, LETTERS, MONTHS, OPPOSITES, PEOPLE, THINGS

Made = tuple[str, str, list[str]]  # stem, right answer, three wrong answers


def near_misses(random: Random, answer: int) -> list[str]:
    """Three other numbers close to `answer`, none below zero.

    How many of them are smaller is drawn first, so that the middle of the four is no better a guess than the ends.
    """
    smaller = [answer - step for step in (1, 2, 3, 10) if answer >= step]
    larger = [answer + step for step in (1, 2, 3, 10)]
    num_smaller = min(random.randrange(4), len(smaller))
    return [str(n) for n in (*random.sample(smaller, num_smaller), *random.sample(larger, 3 - num_smaller))]


def addition(random: Random) -> Made:
    left, right = random.randint(1, 20), random.randint(1, 20)
    return f"What is {left} + {right}?", str(left + right), near_misses(random, left + right)


def subtraction(random: Random) -> Made:
    right, answer = random.randint(1, 20), random.randint(0, 20)
    return f"What is {right + answer} - {right}?", str(answer), near_misses(random, answer)


def number_order(random: Random) -> Made:
    word, pick = random.choice((("largest", max), ("smallest", min)))
    numbers = random.sample(range(1, 100), 4)
    answer = pick(numbers)
    return f"Which number is the {word}?", str(answer), [str(n) for n in numbers if n != answer]


def number_sequences(random: Random) -> Made:
    start, step = random.randint(1, 30), random.randint(1, 6)
    shown = [start + step * k for k in range(4)]
    if random.random() < 0.5:
        shown.reverse()
        step = -step
        shown = [number + abs(step) for number in shown]  # so that the number after the last one is at least 1
    answer = shown[-1] + step
    return f"Which number comes next: {', '.join(map(str, shown))}?", str(answer), near_misses(random, answer)


def fixed_orders(random: Random) -> Made:
    cycle = random.choice((DAYS, MONTHS, LETTERS))
    word, step = random.choice((("after", 1), ("before", -1)))
    inside = range(len(cycle)) if cycle is not LETTERS else range(1, len(cycle) - 1)  # the alphabet is no circle
    at = random.choice(inside)
    answer = cycle[(at + step) % len(cycle)]
    wrong = [item for item in cycle if item not in (answer, cycle[at])]
    return f"What comes right {word} {cycle[at]}?", answer, random.sample(wrong, 3)


def lists(random: Random) -> Made:
    people, thing = random.sample(PEOPLE, 4), random.choice(THINGS)
    numbers = [str(n) for n in random.sample(range(1, 100), 4)]
    at = random.randrange(4)
    holdings = ", ".join(f"{who} has {number}" for who, number in zip(people, numbers, strict=True))
    return f"{holdings}. How many {thing} has {people[at]}?", numbers[at], numbers[:at] + numbers[at + 1 :]


def opposites(random: Random) -> Made:
    at = random.randrange(len(OPPOSITES))
    pair = OPPOSITES[at] if random.random() < 0.5 else OPPOSITES[at][::-1]
    others = random.sample([p for k, p in enumerate(OPPOSITES) if k != at], 3)
    return f"What is the opposite of {pair[0]}?", pair[1], [random.choice(other) for other in others]


def categories(random: Random) -> Made:
    kind, *others = random.sample(sorted(CATEGORIES), 4)
    article = "an" if kind[0] in "aeiou" else "a"
    wrong = [random.choice(CATEGORIES[other]) for other in others]
    return f"Which of these is {article} {kind}?", random.choice(CATEGORIES[kind]), wrong


FAMILIES: dict[str, Callable[[Random], Made]] = {
    "addition": addition,
    "subtraction": subtraction,
    "number order": number_order,
    "number sequences": number_sequences,
    "fixed orders": fixed_orders,
    "lists": lists,
    "opposites": opposites,
    "categories": categories,
}
