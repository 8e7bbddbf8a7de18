"""Whether a model in memory holds its own weights: no adapter around them, no codes in their place."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tensormix.operators import Operator
from tensormix.storage.codes import is_code


def check_plain(model: nn.Module) -> None:
    """Raise ValueError, naming the first module, if adapters are around the weights of a model, or they are codes."""
    operators: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Operator):
            operators.append(name)
        if any(name == operator or name.startswith(f"{operator}.") for operator in operators[-1:]):
            continue
        if type(module).__module__.split(".")[0] == "peft":
            raise ValueError(
                f"{name or type(module).__name__} is wrapped by PEFT: what is compressed would miss its adapter. Merge "
                "it first: model = model.merge_and_unload()"
            )
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and is_code(weight.dtype):
            raise ValueError(
                f"{name} holds {str(weight.dtype).removeprefix('torch.')}: those are codes, not weights. Load the "
                "model without quantization, or call model.dequantize() where its library can"
            )


def check_untied(model: nn.Module, sites: Iterable[str]) -> None:
    """Raise ValueError, naming the first of these matrices, if a model of transformers has it at another place too.

    A block is looked at as all that it holds.
    """
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    both = {**pairs, **{other: name for name, other in pairs.items()}}
    for site in sites if both else ():
        inside = f"{site}."
        tied = next((name for name in both if name.startswith(inside) and not both[name].startswith(inside)), None)
        if tied is not None:
            raise ValueError(
                f"{site}: {type(model).__name__} ties {tied} to {both[tied]}, and what is put in its place would not "
                "be tied; leave it out by `sites` or `blocks`"
            )
