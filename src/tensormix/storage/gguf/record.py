"""What is known of one architecture of GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tensormix.storage.gguf.layouts import Layout

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF.

    Attributes:
        model_type: of transformers.
        keys: of the metadata, without the architecture in front, and what config.json calls them.
        block: what a tensor of a block is called, and its name there; {} stands for the number of an expert.
        outside: the same for those in no block.
        blocks: the name of the list of blocks.
        layouts: which layout a tensor has, by its name.
        rotary: how much of a head turns: "all", "part" (the config says how much) or "none" (other positions).
        constants: what config.json has to say whatever the file does.
    """

    model_type: str
    keys: Mapping[str, str]
    block: Mapping[str, str]
    outside: Mapping[str, str] = field(default_factory=lambda: _OUTSIDE)
    blocks: str = "model.layers"
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    rotary: str = "all"
    constants: Mapping[str, object] = field(default_factory=dict)
