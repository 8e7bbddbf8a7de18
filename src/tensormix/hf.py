"""Save and load through transformers, as a quantizer plugin. It needs operators only, never methods.

Importing this module registers the quantization method "tensormix": `save_pretrained` of a compressed model writes the
operators' specs into config.json, and `from_pretrained` rebuilds the skeleton from them before the weights are read.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tensormix.operators import Bypass, StructuredLinear, build
from tensormix.sites import fill_dense, install

NAME = "tensormix"
FORMAT_VERSION = 1


class StructuredConfig(QuantizationConfigMixin):
    """What config.json holds: for each replaced module its name and the spec of its operator.

    Args:
        operators: module name -> spec, with a key "bias" that says whether the site has one.
        format_version: of these keys; a higher one than ours is refused.

    Raises:
        ValueError: a key is unknown, or the format is newer than this tensormix.
    """

    def __init__(
        self,
        operators: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = NAME,
        **unknown: Any,
    ) -> None:
        if quant_method != NAME:
            raise ValueError(f"quantization_config: quant_method must be {NAME!r}, got {quant_method!r}")
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"quantization_config: the checkpoint has format_version {format_version!r}, this tensormix reads "
                f"{FORMAT_VERSION}; install the version of tensormix that wrote it"
            )
        if unknown:
            raise ValueError(
                f"quantization_config: unknown key {', '.join(map(repr, sorted(unknown)))}. "
                "Known: quant_method, format_version, operators."
            )
        self.quant_method = NAME  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version = format_version
        self.operators = operators or {}


class StructuredQuantizer(HfQuantizer):
    """Puts empty operators into the skeleton before loading; afterwards the model is an ordinary float model."""

    requires_calibration = True  # a dense checkpoint cannot be compressed while it is loaded

    @property
    def _operators(self) -> dict[str, dict[str, Any]]:
        assert isinstance(self.quantization_config, StructuredConfig)
        return self.quantization_config.operators

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        parallel = getattr(getattr(model, "config", None), "distributed_config", None)
        if getattr(parallel, "tp_plan", None) is not None:
            raise ValueError(
                "tp_plan: structured operators cannot be split over devices by tensor parallelism; "
                "load without tp_plan (device_map works)"
            )
        install_empty(model, self._operators)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        # Otherwise .half() and .float() raise, and the Trainer asks for adapters.
        model.is_quantized = False  # pyright: ignore[reportArgumentType]
        for module in model.modules():
            config = module.__dict__.get("config")
            if getattr(config, "_is_quantized", False):
                config._is_quantized = False  # pyright: ignore[reportOptionalMemberAccess]
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Every operator becomes the dense layer that the architecture has there.

        Raises ValueError for dropped blocks, and for a bias that the architecture has no place for.
        """
        with torch.device("meta"):
            skeleton = type(model)(copy.deepcopy(model.config))
        for name in self._operators:
            operator, dense = model.get_submodule(name), skeleton.get_submodule(name)
            if not isinstance(operator, StructuredLinear):
                raise ValueError(f"{name} was dropped and its weights are gone: this model has no dense form")
            if operator.bias is not None and getattr(dense, "bias", None) is None:
                raise ValueError(
                    f"{name} holds a constant output, but the architecture has no bias there: "
                    "this model has no dense form"
                )
            fill_dense(dense, operator.to_dense().to(dtype), operator.bias)
            dense.train(operator.training)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dense)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Operators are ordinary float weights; without this the Trainer refuses them."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


register_quantization_config(NAME)(StructuredConfig)
register_quantizer(NAME)(StructuredQuantizer)


def install_empty(model: nn.Module, operators: dict[str, dict[str, Any]]) -> None:
    """Put an empty operator, on meta, at every module named in `operators`: module name -> spec with "bias".

    Raises ValueError if a name is not in the model, or a spec cannot be built or does not fit there.
    """
    for name, entry in operators.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"quantization_config: operators names {name!r}, which a {type(model).__name__} does not have"
            ) from None
        spec = {key: value for key, value in entry.items() if key != "bias"}
        with torch.device("meta"):
            operator = build(spec).to(next(old.parameters()).dtype)
            if entry.get("bias") and getattr(old, "bias", None) is None:
                operator.bias = nn.Parameter(torch.empty(operator.out_features, dtype=operator.weight.dtype))
        install(model, name, operator)
    _record_bypassed(model)


def _record_bypassed(model: nn.Module) -> None:
    """Let `output_hidden_states` see dropped blocks too: transformers looks for blocks by their class."""
    try:
        from transformers.utils.output_capturing import install_output_capuring_hook as record
    except ImportError:  # releases that collect the states elsewhere
        return
    for block in model.modules():
        if isinstance(block, Bypass) and not block._forward_hooks:
            record(block, "hidden_states", 0)


def attach(model: nn.Module) -> None:
    """Make `model.save_pretrained` write what `from_pretrained` needs, for all operators in the model.

    A model without operators is left an ordinary dense one. Raises ValueError if it is quantized by something else.
    """
    config: Any = model.config
    existing = getattr(config, "quantization_config", None)
    method = existing.get("quant_method") if isinstance(existing, dict) else getattr(existing, "quant_method", None)
    if existing is not None and method != NAME:
        raise ValueError(
            f"the model is quantized by {method!r} already, and a checkpoint has one quantization_config: "
            "load it without quantization to compress it"
        )
    operators = _entries(model)
    if not operators:
        return
    _record_bypassed(model)
    config.quantization_config = StructuredConfig(operators=operators)
    model.hf_quantizer = StructuredQuantizer(config.quantization_config)  # pyright: ignore[reportArgumentType]
    model.is_quantized = False  # pyright: ignore[reportArgumentType]


def _entries(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The spec of every outermost operator: module name -> spec with "bias"."""
    entries: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in entries):
            continue
        if isinstance(module, StructuredLinear):
            entries[name] = {**module.spec, "bias": module.bias is not None}
        elif isinstance(module, Bypass):
            entries[name] = module.spec
    return entries
