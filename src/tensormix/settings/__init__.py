"""What each stage can be told: the sections of a recipe. Frozen, keyword only, unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from .base import Settings, Source, is_list, is_mapping, listed
from .training import Distill, EarlyStop, HeldOut, Lora, Recover, ZerothOrder

__all__ = [
    "Benchmark",
    "Budget",
    "Calibration",
    "Distill",
    "EarlyStop",
    "Evaluate",
    "Exam",
    "HeldOut",
    "Lora",
    "Perplexity",
    "Profile",
    "Recover",
    "Reparameterise",
    "Search",
    "Settings",
    "Source",
    "ZerothOrder",
    "is_list",
    "is_mapping",
]


class Budget(Settings):
    """What the sites of the plan may cost together; it decides the size of every method that has one."""

    keep: float = Field(gt=0, le=1)  # fraction of the dense cost that stays
    of: Literal["bits", "parameters", "macs", "bytes_per_token"] = "bits"  # stored; multiplied, read for one token
    over: Literal["sites", "model"] = "sites"  # whose cost: of the sites that the plan matches, or of the whole model
    by: Literal["uniform", "spectrum", "greedy", "sensitivity", "learned"] = (
        "uniform"  # how it is divided among the sites
    )
    measure: Literal["kl", "loss", "angle"] = "kl"  # of sensitivity: what says how much a site matters
    tokens: int = Field(default=512, ge=2)  # of the calibration text, on which kl and loss are measured for each site
    levels: int = Field(default=12, ge=1)  # sizes of a site that are fitted, where only a fit tells the error
    steps: int = Field(default=100, ge=1)  # of training, where the sizes are learned


class Search(Settings):
    """Which sites of a laser plan are reduced at all, and how far: those that score best with the model in memory.

    It scores on questions of its own: those of the exam that follow the ones that evaluate asks, or without an exam
    the tokens that follow `num_tokens` in the first text of perplexity.
    """

    keep_rank: tuple[float, ...] = Field(min_length=1)  # what is tried at every site
    part: float = Field(default=0.2, gt=0, lt=1)  # of all questions or tokens that is for choosing; the rest judges

    @field_validator("keep_rank")
    @classmethod
    def _fractions(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < rate <= 1 for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"fractions of the largest rank, above 0 and at most 1, each once, got {list(rates)}")
        return rates


class Reparameterise(Settings):
    """Other weights for the same function: the dense model in the bases in which the plan's operators lose least."""

    steps: int = Field(default=200, ge=1)  # of L-BFGS, at most; each writes out every operator of the plan


class Calibration(Settings):
    """The inputs that methods with statistics see."""

    text: Source
    num_windows: int = Field(default=8, ge=1)
    window: int = Field(default=512, ge=1)  # tokens
    inputs: Literal["propagated", "dense"] = "propagated"  # what the compressed blocks pass on, or the dense ones
    precision: Literal["float64", "float32"] = "float64"  # of the statistics
    spill: bool = False  # keep the activations between blocks on the disk instead of in memory


class Perplexity(Settings):
    """Perplexity per token of one text."""

    text: Source
    window: int = Field(default=512, ge=2)  # tokens the model sees at once
    stride: int = Field(default=512, ge=1)  # new tokens per window; what they overlap is context only
    bos: bool = True  # put the BOS token before every window
    num_tokens: int | None = Field(default=None, ge=2)  # only the first of the text; all without it
    domain: Literal["in_domain", "held_out"] | None = None  # of a recovery: like the text it reads, or not; rows say it

    @model_validator(mode="after")
    def _no_gaps(self) -> Self:
        if self.stride > self.window:
            raise ValueError(
                f"stride must be at most window ({self.window}), or tokens are left out; got {self.stride}"
            )
        return self


class Exam(Settings):
    """The built-in four-choice exam, or four-choice questions of one's own."""

    file: str | None = None  # .jsonl with text (a prompt that ends in "Answer:") and gold (0 to 3) on each line
    num_questions: int = Field(default=600, ge=1)  # of a file the first
    seed: int = Field(default=1, ge=0)  # of the built-in questions
    shots: int = Field(default=5, ge=0)  # worked examples before each built-in question

    @model_validator(mode="after")
    def _as_they_stand(self) -> Self:
        given = [name for name in ("seed", "shots") if getattr(self, name) != type(self).model_fields[name].default]
        if self.file is not None and given:
            raise ValueError(f"the questions of a file are asked as they stand: leave out {listed(given)}")
        return self


class Benchmark(Settings):
    """A published benchmark, asked by lm-eval."""

    name: Literal["mmlu", "arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande"]
    file: str | None = None  # .jsonl with query, choices, gold (and subject) on each line; without it the Hub
    examples: str | None = None  # .jsonl of the same kind, from which worked examples are taken
    shots: int = Field(default=0, ge=0)  # worked examples before each question; 5 for mmlu if nothing is said
    num_questions: int | None = Field(default=None, ge=1)  # a random sample of them; all without it
    seed: int = Field(default=0, ge=0)  # of the sample, and of worked examples that are drawn
    too_long: Literal["refuse", "leave_out"] = "refuse"  # questions longer than the context; never cut

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        value = {"name": value} if isinstance(value, str) else value
        return {"shots": 5, **value} if is_mapping(value) and value.get("name") == "mmlu" else value


class Evaluate(Settings):
    """What is measured of the model."""

    perplexity: tuple[Perplexity, ...] = ()
    kl: bool = False  # of each text of perplexity also how far the predictions are from those of the dense model
    exam: Exam | None = Exam()  # null: none
    benchmarks: tuple[Benchmark, ...] = ()  # names, or mappings with a name and settings
    direct: bool = False  # also of the compressed model before its recovery
    # questions or windows at a time, halved where the memory does not suffice; "auto" also tries more
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        names = [benchmark.name for benchmark in self.benchmarks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the benchmark {twice!r} is there twice; its rows could not be told apart")
        return self


class Profile(Settings):
    """What the model costs."""

    tokens: tuple[int, ...] = Field(default=(1, 128), min_length=1)  # lengths of the timed passes
    repeats: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _at_least_one_token(self) -> Self:
        if min(self.tokens) < 1:
            raise ValueError(f"tokens must be at least 1, got {min(self.tokens)}")
        return self
