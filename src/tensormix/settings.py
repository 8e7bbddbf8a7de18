"""What each stage can be told: the sections of a recipe. Frozen, keyword only, unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


def is_mapping(value: object) -> TypeGuard[dict[str, object]]:
    """For what a file says, before it is checked."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[object] | tuple[object, ...]]:
    return isinstance(value, list | tuple)


class Settings(BaseModel):
    """The base of every section."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Settings):
    """A source of text: exactly one of `file`, `hub`, `exam` and `facts`."""

    # .txt, .json, .jsonl, .csv, .tsv, .parquet, each also packed (.gz ...), or a folder; relative to the recipe
    file: str | None = None
    hub: str | None = None  # a dataset on the Hugging Face Hub
    config: str | None = None  # of the Hub dataset, where it has several
    split: str = "train"  # of the Hub dataset
    exam: bool = False  # questions of the built-in exam with their answers
    facts: bool = False  # the facts that the built-in exam asks for, as prose
    # Where the text is in a record: a name, with dots for nested ones, or several joined by +. Records without a "text"
    # are told by their fields: messages, or a question with its answer.
    field: str = "text"
    # Records as conversations in the words of the tokenizer's own chat template: the field that holds the messages, or
    # a field for each role, in the order in which they speak.
    chat: str | dict[Literal["system", "user", "assistant"], str] | None = None
    weight: float = Field(default=1.0, gt=0)  # share of the tokens, relative to the other sources of a mixture
    skip_documents: int = Field(default=0, ge=0)  # leave out the first of them: what is measured on, say
    num_documents: int | None = Field(default=None, ge=1)  # only the first of those that follow; all without it
    seed: int = Field(default=0, ge=0)  # of what is generated

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("file", "hub", "exam", "facts") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"a source of text is exactly one of file, hub, exam and facts, got {_listed(given)}")
        if self.hub is None and (self.config is not None or self.split != "train"):
            raise ValueError("config and split belong to a hub source")
        if self.chat is not None and (self.exam or self.facts):
            raise ValueError("chat belongs to records of a file or of the Hub, not to what is generated")
        if self.skip_documents and (self.exam or self.facts):
            raise ValueError("skip_documents belongs to a file or to the Hub; of what is generated take another seed")
        return self


class Budget(Settings):
    """What the sites of the plan may cost together; it decides the size of every method that has one."""

    keep: float = Field(gt=0, le=1)  # fraction of the dense cost that stays
    of: Literal["bits", "parameters", "macs", "bytes_per_token"] = "bits"  # stored; multiplied, read for one token
    over: Literal["sites", "model"] = "sites"  # whose cost: of the sites that the plan matches, or of the whole model
    by: Literal["uniform", "spectrum", "greedy", "sensitivity", "learned"] = (
        "uniform"  # how it is divided among the sites
    )
    measure: Literal["kl", "loss", "angle"] = "kl"  # of sensitivity: what says how much a site matters
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


class Distill(Settings):
    """What recovery learns from the dense model, where its loss says so."""

    teacher: str | None = None  # a folder, relative to the recipe, or a Hub id; without it the model of the recipe
    # Logits kept of each token; "all": nothing is kept, the teacher runs beside the model at every step.
    top_k: Annotated[int, Field(ge=1)] | Literal["all"] = 32
    tail_samples: int = Field(default=32, ge=1)  # tokens drawn from all others, which stand for them without bias
    cache: str | None = None  # folder of the kept logits; without it one beside the run, shared by a sweep
    hidden: float = Field(default=0.0, ge=0)  # weight of the hidden-state term; the teacher then runs at every step
    local_steps: int = Field(default=100, ge=1)  # of `steps`: block by block before anything else (local_then_kl)
    local_inputs: Literal["propagated", "dense"] = "propagated"  # what enters a block while it is trained alone
    task_steps: int = Field(default=0, ge=0)  # of `steps`: the last ones, on the text alone (the loss lm)


class HeldOut(Settings):
    """Windows of the text that a recovery never learns from: they judge it, and the best state is kept."""

    num_windows: int = Field(default=8, ge=0)  # of all texts together; 0: nothing is judged, the last state is kept
    text: tuple[Source, ...] = ()  # other texts that the model must not get worse on: as many windows of these, too
    num_times: int = Field(default=5, ge=1)  # how often after the start, evenly spread, the last time at the end


class EarlyStop(Settings):
    """Ends a recovery whose outcome is clear: the exam is asked at every checkpoint (`save_every`)."""

    threshold: float | None = Field(default=None, gt=0, lt=1)  # accuracy; a sweep that bisects knows it by itself
    num_questions: int = Field(default=200, ge=1)


class Lora(Settings):
    """The low-rank patch of each compressed layer, where `parameters` is lora."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)  # alpha / rank is the scale of a patch

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Recover(Settings):
    """Training after compression."""

    text: tuple[Source, ...] = Field(min_length=1)  # mixed by weight
    steps: int = Field(default=3000, ge=1)
    batch_size: int = Field(default=16, ge=1)  # windows per step
    window: int = Field(default=256, ge=2)  # tokens
    # "auto": the first step promises to lower the loss by half, to first order; what that is depends on the model.
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    warmup: float = Field(default=0.03, ge=0, lt=1)  # fraction of the steps
    weight_decay: float = Field(default=0.0, ge=0)
    loss: Literal["lm", "kl", "local_then_kl"] = "lm"  # the text's tokens, the dense model's logits, its blocks first
    distill: Distill = Distill()  # of the losses kl and local_then_kl
    core_rate: Literal["same", "fan_in"] = "same"  # fan_in: times in_features / fan-in of each matrix of an operator
    diverged: float | None = Field(default=3.0, gt=0)  # stop when the loss is so far (nats) above its lowest
    parameters: Literal["all", "compressed", "lora"] = "all"  # which are trained; lora: patches of compressed layers
    lora: Lora = Lora()  # of parameters: lora
    # Every token, or answers alone: the letters of the exam, what the assistant says in a conversation (chat), the
    # last of several fields (field: question+answer). Of text that asks nothing every token counts either way.
    loss_on: Literal["all", "answers"] = "all"
    save_every: int = Field(default=500, ge=1)  # steps between checkpoints
    held_out: HeldOut = HeldOut()
    early_stop: EarlyStop | None = None  # without it every recovery takes all its steps
    recompute: bool = False  # keep only what enters each block and compute the rest again: less memory, more time

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        local = self.distill.local_steps if self.loss == "local_then_kl" else 0
        task = self.distill.task_steps if self.loss != "lm" else 0
        if local + task > 0 and local + task >= self.steps:
            raise ValueError(
                f"steps ({self.steps}) must be more than distill.local_steps and distill.task_steps together "
                f"({local + task}), or none are left to learn from the logits"
            )
        return self

    @model_validator(mode="after")
    def _patches_learn_together(self) -> Self:
        if self.parameters == "lora" and self.loss == "local_then_kl":
            raise ValueError("parameters lora trains the patches of all blocks together; take the loss lm or kl")
        if self.parameters == "lora" and self.core_rate != "same":
            raise ValueError(
                f"core_rate {self.core_rate} is of the matrices of operators, which parameters lora leaves as they are"
            )
        return self


class Perplexity(Settings):
    """Perplexity per token of one text."""

    text: Source
    window: int = Field(default=512, ge=2)  # tokens the model sees at once
    stride: int = Field(default=512, ge=1)  # new tokens per window; what they overlap is context only
    bos: bool = True  # put the BOS token before every window
    num_tokens: int | None = Field(default=None, ge=2)  # only the first of the text; all without it

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
            raise ValueError(f"the questions of a file are asked as they stand: leave out {_listed(given)}")
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


def _listed(names: list[str]) -> str:
    return " and ".join(names) or "none of them"
