"""The cases of tools/same.py that need no command line: what the package itself offers to Python.

Each takes an empty folder, saves checkpoints there, and returns what its models say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from same_cases import JOINT_FAMILIES, JOINT_PLAN, method
from same_models import DENSE, EXPERTS, family_model, token_ids
from transformers import AutoModelForCausalLM

import tensormix

Said = dict[str, Any]
PLAN = [
    method("mixt", blocks=0, num_branches=2, init="aware", max_steps=20),
    method("mean_output", blocks=1),
    method("rtn", blocks=2, bits=4, group=16),
    method("svd_llm", blocks=3, keep=0.5, sites=["o", "down"]),
]
SIBLINGS = [method("mixt", blocks="all", num_branches=3)]


def plan_of(rules: list[Said]) -> Any:
    return tensormix.Plan.model_validate(rules)


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def answer(model: Any) -> Said:
    """The logits, as a hash and as a few numbers that show how far two of them are apart, and a text."""
    ids = token_ids(rows=2, length=12, seed=3)
    logits = model(ids).logits.float().contiguous()
    text = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, attention_mask=ids.ne(-1))
    digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]
    return {
        "logits": digest,
        "sum": logits.double().sum().item(),
        "first": logits[0, 0, 0].item(),
        "text": text.tolist(),
    }


def in_memory(family: str, rules: list[Said], out: Path) -> Said:
    """Compressed in memory, saved, loaded again."""
    model = family_model(family)
    rows = tensormix.compress(model, plan_of(rules), [token_ids(seed=seed) for seed in range(2)])
    model.save_pretrained(out / "compressed", max_shard_size="40KB")
    return {"rows": rows, "before": answer(model), "after": answer(loaded(out / "compressed"))}


def half(family: str, out: Path) -> Said:
    model = family_model(family).to(torch.bfloat16)
    rows = tensormix.compress(model, plan_of(PLAN), [token_ids()])
    model.save_pretrained(out / "compressed")
    return {"rows": rows, "after": answer(loaded(out / "compressed", dtype="auto"))}


def while_loading(family: str, out: Path) -> Said:
    """Compressed while transformers loads the dense model."""
    family_model(family).save_pretrained(out / "dense")
    rules = [method("mixt", blocks=0, num_branches=2), method("svd", blocks="2-3", keep=0.5)]
    model = loaded(out / "dense", quantization_config=tensormix.CompressConfig(plan_of(rules)))
    model.save_pretrained(out / "compressed")
    return answer(model)


def on_disk(family: str, out: Path) -> Said:
    """From disk to disk, and the result once more."""
    family_model(family).save_pretrained(out / "dense", max_shard_size="40KB")
    rows = tensormix.compress_checkpoint(out / "dense", out / "compressed", plan_of(PLAN[:1]), [token_ids()])
    more = plan_of([method("drop_blocks", blocks=1), method("rtn", blocks=3, bits=8, group=16)])
    rows += tensormix.compress_checkpoint(out / "compressed", out / "again" / "compressed", more)
    return {"rows": rows, **answer(tensormix.load_model(out / "again" / "compressed"))}


def with_siblings(family: str, out: Path) -> Said:
    """Layers that read the same input as one product."""
    model = family_model(family)
    tensormix.compress(model, plan_of(SIBLINGS))
    with tensormix.fuse_siblings(model) as rows:
        model.save_pretrained(out / "compressed")
        return {"rows": rows, **answer(model)}


def narrowed(family: str, out: Path) -> Said:
    """Joint methods, run without the zeros that they leave."""
    model = family_model(family)
    tensormix.compress(model, plan_of(JOINT_PLAN), [token_ids()])
    with tensormix.without_zeros(model):
        return answer(model)


SAYINGS: dict[str, Callable[[Path], Said]] = {
    **{f"memory/{family}": partial(in_memory, family, PLAN) for family in [*DENSE, *EXPERTS]},
    **{f"memory/joint_{family}": partial(in_memory, family, JOINT_PLAN) for family in JOINT_FAMILIES},
    **{f"memory/half_{family}": partial(half, family) for family in ("llama", "gpt2", "opt")},
    **{f"loading/{family}": partial(while_loading, family) for family in ("llama", "gpt2", "qwen3_moe", "gpt_oss")},
    **{f"disk/{family}": partial(on_disk, family) for family in ("llama", "opt", "qwen3_moe")},
    **{f"inference/siblings_{family}": partial(with_siblings, family) for family in ("llama", "qwen3")},
    **{f"inference/zeros_{family}": partial(narrowed, family) for family in ("llama", "phi3")},
}
