"""The words that the exam asks about. All of it is common knowledge, written for this package."""

from __future__ import annotations

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"),
    ("big", "small"),
    ("tall", "short"),
    ("fast", "slow"),
    ("early", "late"),
    ("open", "closed"),
    ("full", "empty"),
    ("young", "old"),
    ("happy", "sad"),
    ("light", "dark"),
    ("loud", "quiet"),
    ("near", "far"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("hard", "soft"),
    ("wet", "dry"),
    ("high", "low"),
    ("first", "last"),
    ("left", "right"),
    ("good", "bad"),
    ("clean", "dirty"),
    ("thick", "thin"),
    ("wide", "narrow"),
    ("sweet", "bitter"),
    ("brave", "afraid"),
    ("war", "peace"),
    ("day", "night"),
    ("up", "down"),
    ("love", "hate"),
    ("begin", "end"),
)

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("dog", "cat", "horse", "cow", "lion", "tiger", "sheep", "goat", "rabbit", "mouse", "bear", "wolf"),
    "fruit": ("apple", "pear", "plum", "cherry", "grape", "lemon", "orange", "melon", "peach", "banana"),
    "colour": ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "purple"),
    "tool": ("hammer", "saw", "drill", "axe", "spade", "rake", "wrench", "pliers", "shovel", "chisel"),
    "metal": ("iron", "gold", "silver", "copper", "zinc", "lead", "tin", "nickel"),
    "vehicle": ("car", "bus", "train", "truck", "ship", "bicycle", "plane", "tram"),
    "instrument": ("piano", "violin", "flute", "drum", "guitar", "trumpet", "harp", "cello"),
    "garment": ("shirt", "coat", "hat", "sock", "glove", "scarf", "skirt", "dress"),
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
LETTERS = tuple("EFGHIJKLMNOPQRSTUVWXYZ")  # A to D are the names of the choices

PEOPLE: tuple[str, ...] = ("Tom", "Ann", "Sue", "Bob", "Max", "Eve", "Ian", "Kim", "Lea", "Ned", "Pam", "Roy")
THINGS = ("apples", "books", "coins", "cards", "pens", "keys", "shells", "stamps")
