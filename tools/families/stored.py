"""Compressed models in their folders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import transformers
from configs import Tiny
from shown import some
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from trying import HALF, NotTried, Refused, asked, batches, dense, error, folder, logits, plan

from tensormix.compression.checkpoint import compress_checkpoint
from tensormix.models import load_model
from tensormix.sites import blocks, locate_blocks


def comes_back(which: Literal["causal", "bare", "own"]) -> Callable[[Tiny], str]:
    """A compressed model comes back from its folder: as causal model, as bare model, as what the config names."""

    def feature(tiny: Tiny) -> str:
        cls = {"causal": AutoModelForCausalLM, "bare": AutoModel, "own": getattr(transformers, tiny.class_name)}[which]
        model = tiny.make()

        def found(model: Any) -> Tensor:
            return leaves(bare(model) if which == "bare" else model, tiny)

        with folder() as path:
            model.save_pretrained(path / "dense")
            rough = dense(lambda: error(leaves(cls.from_pretrained(path / "dense").eval(), tiny), found(model)))
            if not rough <= 1e-5:
                raise NotTried(f"the dense model comes back off by {rough:.1e}")
            asked(tiny, model, plan(blocks="1", method=HALF))
            model.save_pretrained(path / "out")
            off = error(leaves(cls.from_pretrained(path / "out").eval(), tiny), found(model))
            assert off < 1e-5, f"off by {off:.1e}"
            if which == "causal":
                off = error(leaves(load_model(path / "out"), tiny), found(model))
                assert off < 1e-5, f"load_model is off by {off:.1e}"
        return f"off by {off:.0e}"

    return feature


def comes_back_densely(model: nn.Module, again: nn.Module) -> None:
    """Some classes lose numbers when they are loaded, such as the embedding of the padding."""
    lost = [name for name, value in model.state_dict().items() if not torch.equal(value, again.state_dict()[name])]
    if lost:
        raise NotTried(f"the dense model comes back with other numbers: {some(lost)}")


def bare(model: Any) -> Any:
    return getattr(model, "base_model", model)


@torch.no_grad()
def leaves(model: Any, tiny: Tiny) -> Tensor:
    return model(input_ids=tiny.tokens(), use_cache=False)[0]


def from_files(tiny: Tiny) -> str:
    """From files into files gives what is made in memory, to the bit."""
    cls = getattr(transformers, tiny.class_name)
    rules = plan(method={"name": "svd_llm", "keep": 0.6})
    with folder() as path:
        made = tiny.make()
        dense(lambda: made.save_pretrained(path / "dense"))
        # What a file brings may lie in memory in another way, and that alone changes the last bits of some models.
        model = dense(lambda: cls.from_pretrained(path / "dense").eval())
        comes_back_densely(made, model)
        try:
            compress_checkpoint(path / "dense", path / "out", rules, batches(tiny))
        except ValueError as refusal:
            raise Refused(str(refusal)) from refusal
        asked(tiny, model, rules, batches(tiny))
        model.save_pretrained(path / "memory")
        off = error(leaves(cls.from_pretrained(path / "out").eval(), tiny), leaves(model, tiny))
        assert off < 1e-5, f"the logits are off by {off:.1e}"
        one, other = (stored(path / name) for name in ("out", "memory"))
        unlike = [name for name in one if name in other and not torch.equal(one[name], other[name])]
        assert not unlike, f"other numbers: {some(unlike)}"
    return f"{len(one)} tensors" + ("" if set(one) == set(other) else f", other names: {some(set(one) ^ set(other))}")


def stored(path: Any) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def dropped_and_saved(tiny: Tiny) -> str:
    """A model without two of its blocks is saved and loaded."""
    model = tiny.make()
    cls = getattr(transformers, tiny.class_name)
    with folder() as path:
        dense(lambda: model.save_pretrained(path))
        comes_back_densely(model, dense(lambda: cls.from_pretrained(path)))
    asked(tiny, model, plan(blocks=f"{len(blocks(model)) - 1}", method={"name": "drop_blocks"}))
    with folder() as path:
        model.save_pretrained(path)
        again = cls.from_pretrained(path).eval()
        off = error(logits(again, tiny.tokens()), logits(model, tiny.tokens()))
    assert off < 1e-5, f"off by {off:.1e}"
    return f"off by {off:.0e}"


def offloaded(tiny: Tiny) -> str:
    """With blocks on the disk the logits are those in memory."""
    model = tiny.make()
    cls = getattr(transformers, tiny.class_name)
    with folder() as path:
        model.save_pretrained(path / "dense")
        places = placed(model)

        def load(name: str) -> Any:
            away = cls.from_pretrained(path / name, device_map=places, offload_folder=str(path / f"{name}_away")).eval()
            return logits(away, tiny.tokens())

        rough = error(dense(lambda: load("dense")), logits(model, tiny.tokens()))
        if not rough <= 1e-4:
            raise NotTried(f"the dense model is off by {rough:.1e}")
        asked(tiny, model, plan(method=HALF))
        model.save_pretrained(path / "out")
        off = error(load("out"), logits(model, tiny.tokens()))
    assert off < 1e-4, f"off by {off:.1e}"
    return f"off by {off:.0e}"


def placed(model: Any) -> dict[str, str]:
    """Every block but the first on the disk, all else on the CPU."""
    root, layers = locate_blocks(model)
    places = {f"{root}.{index}": "disk" if index else "cpu" for index in range(len(layers))}

    def rest(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if root == path:
                continue
            if root.startswith(f"{path}."):
                rest(child, f"{path}.")
            else:
                places[path] = "cpu"

    rest(model, "")
    return places
