"""Save and load through transformers, as a quantizer plugin. It needs operators only, never methods.

Importing this module registers the quantization method "tensormix": `save_pretrained` of a compressed model writes the
operators' specs into config.json, and `from_pretrained` rebuilds the skeleton from them before the weights are read.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tensormix.hf.contents import check_connected, fitted_blocks, install_empty, names_in, operators_of, record_bypassed
from tensormix.hf.packed import PackedQuantizer
from tensormix.hf.renaming import keep_apart, own_names
from tensormix.operators import Experts, Owner, StructuredLinear, outermost
from tensormix.sites import fill_dense
from tensormix.sites.fused_experts import close_experts
from tensormix.sites.installing import mark_replacement, remove_owner
from tensormix.sites.locate import uncompiled
from tensormix.sites.sliced import shrink, width_of
from tensormix.storage.packed import pack_of

NAME = "tensormix"
FORMAT_VERSION = 1


class StructuredConfig(QuantizationConfigMixin):
    """What config.json holds: for each replaced module its name and the spec of its operator.

    Args:
        operators: module name -> spec, with a key "bias" that says whether the site has one.
        format_version: of these keys; a higher one than ours is refused.
        packed: the source's own quantization_config, if tensors beside the operators are stored packed as they were
            there. They become plain weights when they are loaded, and this key is gone.
        sliced: the number of channels of the residual stream, if it is narrower than the config's.
        fitted: the blocks of the architecture that were fitted to take the place of others.

    Raises:
        ValueError: a key is unknown, the format is newer than this tensormix, or the pack is none that can be read.
    """

    def __init__(
        self,
        operators: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = NAME,
        packed: dict[str, Any] | None = None,
        sliced: int | None = None,
        fitted: list[str] | None = None,
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
                "Known: quant_method, format_version, operators, packed, sliced, fitted."
            )
        self.quant_method = NAME  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version = format_version
        self.operators = operators or {}
        self.packed, self.sliced, self.fitted = packed, sliced, fitted
        pack_of(packed)

    @property
    def is_plain(self) -> bool:
        """Whether it says nothing of the loaded model."""
        return not (self.operators or self.fitted) and self.sliced is None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if value is not None}


class StructuredQuantizer(PackedQuantizer):
    """Puts empty operators into the skeleton before loading; afterwards the model is an ordinary float model.

    Tensors beside the operators that are stored packed become plain weights on the way.
    """

    requires_calibration = True  # a dense checkpoint is compressed while it is loaded by `while_loading`, not by this

    def __init__(self, quantization_config: StructuredConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, pack_of(quantization_config.packed), **kwargs)

    @property
    def _operators(self) -> dict[str, dict[str, Any]]:
        return cast(StructuredConfig, self.quantization_config).operators

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        refuse_tensor_parallelism(model)
        install_all(model, cast(StructuredConfig, self.quantization_config))
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        found = super().update_weight_conversions(weight_conversions, model)
        return [*found, *own_names(model, found)]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        unmark(model)
        self.forget_pack(model)
        cast(StructuredConfig, self.quantization_config).packed = None
        if cast(StructuredConfig, self.quantization_config).is_plain:
            self.remove_quantization_config(model)
        else:
            _let_save(model, self)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Every operator becomes the dense layer that the architecture has there, opened experts the fused module.

        Raises ValueError for dropped blocks, and for a bias that the architecture has no place for.
        """
        if width_of(model) is not None:
            raise ValueError("the residual stream is sliced: this model has no dense form")
        if isinstance(dtype, str):  # as save_pretrained leaves it in the config that it comes from
            dtype = getattr(torch, dtype)
        with torch.device("meta"):
            skeleton = type(model)(copy.deepcopy(model.config))
        opened = [name for name, module in model.named_modules() if isinstance(module, Experts)]
        owners: list[str] = []
        for name in opened:
            close_experts(model, name, dtype)
        for name, operator in list(outermost(model)):
            if isinstance(operator, Owner):
                owners.append(name)
                continue
            dense = skeleton.get_submodule(name)
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
        for name in owners:
            remove_owner(model, name)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """Asked before anything is saved: what was put into the model since it was made or loaded is saved too.

        The names are those without wrappers, which a loaded model does not have.
        """
        with uncompiled(model) as is_wrapped:
            attach(model)
            keep_apart(model)
            state, metadata = super().get_state_dict_and_metadata(model)
            return (model.state_dict() if is_wrapped else state), metadata

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


def refuse_tensor_parallelism(model: nn.Module) -> None:
    """Raise ValueError if the model is being loaded with a tp_plan."""
    parallel = getattr(getattr(model, "config", None), "distributed_config", None)
    if getattr(parallel, "tp_plan", None) is not None:
        raise ValueError(
            "tp_plan: structured operators cannot be split over devices by tensor parallelism; "
            "load without tp_plan (device_map works)"
        )


def unmark(model: nn.Module) -> None:
    """Make transformers forget that the model is quantized.

    Otherwise .half() and .float() raise, the Trainer asks for adapters, and some models call dense layers differently.
    """
    model.is_quantized = False  # pyright: ignore[reportArgumentType]
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        if hasattr(config, "_is_quantized"):
            del config._is_quantized


def read_packed(config: Any) -> None:
    """Change the config of a model whose checkpoint is packed by others so that loading makes plain weights of it.

    Raises ValueError if it is packed in a way that cannot be read.
    """
    found = _as_dict(getattr(config, "quantization_config", None))
    if found and found.get("quant_method") != NAME:
        found = config.quantization_config = StructuredConfig(packed=found).to_dict()
    if found.get("packed"):
        config.dtype = config.dtype or torch.bfloat16  # the first tensor on disk may be fp8


def forget_pack(model: Any) -> None:
    """Of a model whose weights were unpacked one by one: it is saved as one of plain weights."""
    found = _as_dict(getattr(model.config, "quantization_config", None))
    if not found.pop("packed", None):
        return
    config = StructuredConfig(**found)
    if config.is_plain:
        del model.config.quantization_config
    else:
        model.config.quantization_config = config


def _as_dict(quantization_config: Any) -> dict[str, Any]:
    found = quantization_config or {}
    return found if isinstance(found, dict) else found.to_dict()


def install_all(model: nn.Module, config: StructuredConfig) -> None:
    """Make a dense skeleton what `config` says: its residual stream sliced, and empty operators where they belong.
    A block that was fitted is one of the skeleton's already.

    Raises ValueError as `shrink` and `install_empty` do.
    """
    if config.sliced is not None:
        shrink(model, config.sliced)
    install_empty(model, config.operators)
    check_connected(model)
    for name in names_in(model, config.fitted or ()).values():
        mark_replacement(model.get_submodule(name))


def attach(model: nn.Module) -> None:
    """Make `model.save_pretrained` write what `from_pretrained` needs, for all operators in the model.

    A model without operators is left an ordinary dense one; of a skeleton, what is packed on disk stays packed. Raises
    ValueError if it is quantized by something else.
    """
    config: Any = model.config
    existing = _as_dict(getattr(config, "quantization_config", None))
    method = existing.get("quant_method")
    if existing and method != NAME:
        raise ValueError(
            f"the model is quantized by {method!r} already, and a checkpoint has one quantization_config: "
            "load it without quantization to compress it"
        )
    check_connected(model)
    found = StructuredConfig(
        operators=operators_of(model),
        packed=existing.get("packed"),
        sliced=width_of(model),
        fitted=fitted_blocks(model) or None,
    )
    if found.is_plain:
        if existing and not found.packed:  # what it names is no longer there
            del config.quantization_config, model.hf_quantizer
        return
    record_bypassed(model)
    config.quantization_config = found
    _let_save(model, StructuredQuantizer(found))


def attach_parts(model: nn.Module) -> None:
    """`attach` for a model of transformers, or for each that a module of another kind holds."""
    if isinstance(model, PreTrainedModel):
        attach(model)
        return
    for child in model.children():
        attach_parts(child)


def _let_save(model: nn.Module, quantizer: StructuredQuantizer) -> None:
    """Have the models of transformers inside, which can be saved by themselves, write their operators too."""
    for part in model.modules():
        if part is model or (isinstance(part, PreTrainedModel) and any(True for _ in outermost(part))):
            part.hf_quantizer = quantizer  # pyright: ignore[reportArgumentType]
            part.is_quantized = False  # pyright: ignore[reportArgumentType]
