"""Whether a model in memory holds its own weights: no adapter around them, no codes in their place."""

from __future__ import annotations

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
