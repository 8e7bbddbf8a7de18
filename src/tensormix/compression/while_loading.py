"""Compress while `from_pretrained` reads a dense checkpoint: the dense model is never in memory.

    AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressConfig(plan))

Each weight is fitted when it has been read, and let go. The result is to the bit that of `compress` on the loaded
model, and is saved and loaded like it. Importing this module registers it with transformers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tensormix.compression import Home, Walk
from tensormix.compression.fitting import replace
from tensormix.compression.units import Unit
from tensormix.hf import attach, refuse_tensor_parallelism, unmark
from tensormix.plan import Plan
from tensormix.storage.codes import is_code

NAME = "tensormix_plan"


class CompressConfig(QuantizationConfigMixin):
    """The plan by which a dense checkpoint is compressed while it is loaded.

    Raises:
        ValueError: a method of the plan needs calibration.
    """

    def __init__(self, plan: Plan) -> None:
        for rule in plan.root:
            if rule.method.needs:
                needs = ", ".join(kind.__name__ for kind in rule.method.needs)
                raise ValueError(
                    f"{rule.method.name} needs calibration ({needs}), and while a checkpoint is loaded there are only "
                    "weights: use `tensormix run`, or load the model first and call compress(model, plan, batches)"
                )
        self.quant_method = NAME  # pyright: ignore[reportAttributeAccessIssue]
        self.plan = plan

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": NAME, "plan": self.plan.model_dump(mode="json")}


class CompressingQuantizer(HfQuantizer):
    """Takes the tensors of the planned sites as they are read, and puts operators where they belong."""

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        refuse_tensor_parallelism(model)
        walk = Walk(model, cast(CompressConfig, self.quantization_config).plan, Home())
        names = {module: name for name, module in model.named_modules()}
        self._planned: dict[str, list[Unit]] = {}  # module name -> the units whose weights it holds
        self._missing: dict[Unit, set[str]] = {}  # modules that are not read yet
        for unit in walk.units:
            self._missing[unit] = {names[site.module] for site in unit.sites}
            for name in self._missing[unit]:
                self._planned.setdefault(name, []).append(unit)
        self._held = {names[site.module]: site for unit in walk.units for site in unit.sites}
        self._modules = {
            f"{name}.{tensor}": name for name, site in self._held.items() for tensor in site.module.state_dict()
        }  # parameter -> module
        self._error: ValueError | None = None
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return param_name in self._modules

    def get_quantize_ops(self) -> ConversionOps:
        return _Take(self)

    @torch.no_grad()
    def take(self, model: nn.Module, parameter: str, value: Tensor) -> None:
        """Put a tensor where it belongs; when it was the last one of its module, fit what is planned there."""
        name = self._modules[parameter]
        if self._error is None and is_code(value.dtype):
            self._error = ValueError(
                f"{parameter} is stored as {value.dtype}, and nothing says how it is scaled: codes are no weights"
            )
        if self._error is not None or name not in self._planned:
            return
        site = self._held[name]
        if site.kind != "block":
            site.module.register_parameter(parameter.removeprefix(f"{name}."), nn.Parameter(value))
            if any(tensor.is_meta for tensor in site.module.parameters()):
                return
        try:
            self._held.pop(name)  # with the dense weight, when it is fitted
            for unit in self._planned.pop(name):
                self._missing[unit].discard(name)
                if not self._missing[unit]:
                    del self._missing[unit]
                    unit.check({})
                    replace(unit, {}, Home().dense_bits)
        except ValueError as error:
            self._error = error
            return
        for tensor in model.get_submodule(name).state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if self._error is not None:
            raise self._error
        if self._planned:
            raise ValueError(
                f"the checkpoint lacks weights of {', '.join(sorted(self._planned)[:3])}: it is incomplete"
            )
        unmark(model)
        self.remove_quantization_config(model)
        attach(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Take(ConversionOps):
    """Hands a tensor to the quantizer instead of to the model."""

    def __init__(self, quantizer: CompressingQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, **about: Any) -> dict[str, Any]:
        ((_name, value),) = input_dict.items()
        about["missing_keys"].discard(about["full_layer_name"])
        self.quantizer.take(about["model"], about["full_layer_name"], value[0] if isinstance(value, list) else value)
        return {}


register_quantization_config(NAME)(CompressConfig)
register_quantizer(NAME)(CompressingQuantizer)
