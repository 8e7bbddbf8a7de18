"""The base of every section, and what several of them name: a source of text."""

from __future__ import annotations

from typing import Literal, Self, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
            raise ValueError(f"a source of text is exactly one of file, hub, exam and facts, got {listed(given)}")
        if self.hub is None and (self.config is not None or self.split != "train"):
            raise ValueError("config and split belong to a hub source")
        if self.chat is not None and (self.exam or self.facts):
            raise ValueError("chat belongs to records of a file or of the Hub, not to what is generated")
        if self.skip_documents and (self.exam or self.facts):
            raise ValueError("skip_documents belongs to a file or to the Hub; of what is generated take another seed")
        return self


def listed(names: list[str]) -> str:
    return " and ".join(names) or "none of them"
