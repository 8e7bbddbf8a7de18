"""What a recovery can be told."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .base import Settings, Source


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
    """The patch of each compressed layer, where `parameters` is lora."""

    # low_rank: two factors (LoRA). loretta: each of the factors a tensor train. tt_lora: one tensor train.
    form: Literal["low_rank", "loretta", "tt_lora"] = "low_rank"
    rank: int = Field(default=8, ge=1)  # of tt_lora that of every bond
    alpha: float = Field(default=16.0, gt=0)  # alpha / rank is the scale of a patch
    bond: int = Field(default=5, ge=1)  # of the trains of loretta
    modes: int = Field(default=3, ge=1)  # factors into which a train splits the inputs, and the outputs
    layers: Literal["compressed", "all"] = "compressed"  # all: also the dense matrices of the blocks
    # Of low-rank layers: patches of both factors, one after the other, which become part of them; or of the whole.
    low_rank_layers: Literal["factors", "whole"] = "factors"
    merge: bool = False  # in the end, into the matrix of each layer, which must be dense: nothing grows

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @model_validator(mode="after")
    def _of_its_form(self) -> Self:
        readers = {"bond": ("loretta",), "modes": ("loretta", "tt_lora")}
        for name, forms in readers.items():
            # What a file of a run says names every setting, so one that is as it would be without is not asked for.
            if self.form not in forms and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"lora: {name} belongs to the form {' or '.join(forms)}, and form is {self.form}")
        return self


class ZerothOrder(Settings):
    """How the gradient is estimated from losses alone, where `gradient` is zeroth_order."""

    queries: int = Field(default=4, ge=1)  # random directions at the first step; each takes two forward passes
    growth: float = Field(default=0.0, ge=0, lt=1)  # at step k there are queries * k ** growth of them
    most_queries: int | None = Field(default=None, ge=1)  # and never more than these
    perturbation: float = Field(default=1e-3, gt=0)  # how far along a direction the loss is asked, to either side

    @model_validator(mode="after")
    def _most_is_more(self) -> Self:
        if self.most_queries is not None and self.most_queries < self.queries:
            raise ValueError(f"most_queries ({self.most_queries}) must be at least queries ({self.queries})")
        return self


class Recover(Settings):
    """Training after compression."""

    text: tuple[Source, ...] = Field(min_length=1)  # mixed by weight
    steps: int = Field(default=3000, ge=1)
    batch_size: int = Field(default=16, ge=1)  # windows at a time
    accumulation: int = Field(default=1, ge=1)  # batches per step: their gradients are added up
    window: int = Field(default=256, ge=2)  # tokens
    # "auto": the first step promises to lower the loss by half, to first order; what that is depends on the model.
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    warmup: float = Field(default=0.03, ge=0, lt=1)  # fraction of the steps
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate after the warm-up
    weight_decay: float = Field(default=0.0, ge=0)
    loss: Literal["lm", "kl", "local_then_kl"] = "lm"  # the text's tokens, the dense model's logits, its blocks first
    distill: Distill = Distill()  # of the losses kl and local_then_kl
    core_rate: Literal["same", "fan_in"] = "same"  # fan_in: times in_features / fan-in of each matrix of an operator
    diverged: float | None = Field(default=3.0, gt=0)  # stop when the loss is so far (nats) above its lowest
    parameters: Literal["all", "compressed", "lora"] = "all"  # which are trained; lora: patches of compressed layers
    lora: Lora = Lora()  # of parameters: lora
    gradient: Literal["exact", "zeroth_order"] = "exact"  # zeroth_order: from forward passes alone, little memory
    zeroth_order: ZerothOrder = ZerothOrder()
    # Every token, or answers alone: the letters of the exam, what the assistant says in a conversation (chat), the
    # last of several fields (field: question+answer). Of text that asks nothing every token counts either way.
    loss_on: Literal["all", "answers"] = "all"
    save_every: int = Field(default=500, ge=1)  # steps between checkpoints
    held_out: HeldOut = HeldOut()
    early_stop: EarlyStop | None = None  # without it every recovery takes all its steps
    recompute: bool = False  # keep only what enters each block and compute the rest again: less memory, more time

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.accumulation

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

    @model_validator(mode="after")
    def _without_gradients(self) -> Self:
        if self.gradient == "exact":
            return self
        if self.learning_rate == "auto":
            raise ValueError(
                "gradient zeroth_order needs a number as learning_rate: auto looks at gradients, which are never "
                "computed; 0.001 is one to begin with, for patches"
            )
        if self.loss == "local_then_kl":
            raise ValueError("gradient zeroth_order is of the whole model; take the loss lm or kl")
        if self.recompute:
            raise ValueError("recompute saves memory of exact gradients; with gradient zeroth_order leave it out")
        return self
