"""The features, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Callable

import torch
from configs import Tiny
from joints import exact, joint, turned_pairs, turned_stream
from running import checkpointed, compiled, dropped_blocks, generates, halves, padded, trained
from shown import identity, inputs, sites
from stored import comes_back, dropped_and_saved, from_files, offloaded

FEATURES: dict[str, Callable[[Tiny], str]] = {
    "sites": sites,
    "identity": identity,
    "inputs": inputs,
    "flat_llm": joint("flat_llm", keep=0.97),
    "narrow": joint("narrow", keep=0.97),
    "sola": joint("sola", keep=0.97, prime=0.9),
    "streamline": exact(1e-4, blocks="2", method={"name": "streamline", "count": 1, "steps": 0}),
    "slice_gpt": exact(1e-3, method={"name": "slice_gpt", "keep_channels": 1.0}),
    "dropped blocks": dropped_blocks,
    "loaded, causal": comes_back("causal"),
    "loaded, bare": comes_back("bare"),
    "loaded, own class": comes_back("own"),
    "saved without a block": dropped_and_saved,
    "from files": from_files,
    "generate": generates,
    "offloaded": offloaded,
    "bfloat16": halves(torch.bfloat16),
    "float16": halves(torch.float16),
    "padded": padded,
    "recomputed": checkpointed,
    "trained": trained,
    "turned stream": turned_stream,
    "turned pairs": turned_pairs,
    "compiled": compiled,
}
