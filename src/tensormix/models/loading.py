"""Load a model, its tokenizer or its skeleton from where it comes from, dense or compressed.

transformers' progress bars and warnings are silenced: what would make a model wrong is an error here.
"""

# transformers and huggingface_hub say few of their types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch

from tensormix.models.explained import explained
from tensormix.models.source import ModelSource
from tensormix.sites.quiet import quiet
from tensormix.sites.twin import fill_buffers
from tensormix.storage.assembly import Assembly
from tensormix.storage.codes import holds_codes
from tensormix.storage.entries import main_dtype
from tensormix.storage.memory import set_weight
from tensormix.storage.packed import pack_of
from tensormix.storage.safetensors import Safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_model(source: ModelSource | str | Path, dtype: str | None = None) -> PreTrainedModel:
    """The model in evaluation mode on the CPU.

    Args:
        source: a folder with config.json and weights, a Hub id, one file of weights beside its config.json, or a
            source that is open.
        dtype: one of `DTYPES`; "auto" and None keep the checkpoint's own. Weights that are packed in fp8 or MXFP4
            become plain ones, in bfloat16 if the config does not say.

    Raises:
        ValueError: it is no model, its weights are pickled, packed in another way, unreadable or incomplete, or it
            cannot be reached.
    """
    _check_dtype(dtype)
    source = ModelSource.of(source).local
    # Opening the weights finds what is wrong with the files before a minute has passed.
    if source.file is not None or not isinstance(source.weights, Safetensors) or _is_foreign(source):
        return _assembled(source, dtype)
    if any(map(holds_codes, source.entries.values())) and not _is_packed(source):
        Assembly(skeleton(source, dtype), source.weights)  # transformers would take codes for weights
    hf = _register()
    config = source.hf_config()
    options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        with quiet(), explained(source.location):
            hf.read_packed(config)
            model, report = hf.class_of(config).from_pretrained(
                source.location, config=config, dtype=dtype or "auto", **options
            )
    except ValueError:
        if not _is_packed(source):
            Assembly(skeleton(source, dtype), source.weights)  # it may name the tensor, which transformers does not
        raise
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{source}: the weights lack {', '.join(missing[:3])}{more}, which {type(model).__name__} needs; "
            "the checkpoint is incomplete or of another model"
        )
    return model


def _assembled(source: ModelSource, dtype: str | None) -> PreTrainedModel:
    """The same model from files that transformers does not read by itself: one parameter at a time."""
    model = skeleton(source, dtype)
    assembly, trained = Assembly(model, source.weights), {n for n, p in model.named_parameters() if p.requires_grad}
    for making in assembly.makings:
        for name, value in assembly.make(making.targets[0]).items():
            set_weight(model, name, value.clone())  # what is mapped would change, or be cut off, with its file
    for name, other in assembly.tied.items():
        set_weight(model, name, model.get_parameter(other))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    fill_buffers(model)
    _register().forget_pack(model)
    if not source.is_alone and (source.folder / "generation_config.json").exists():
        with quiet(), explained(source.location):
            model.generation_config = type(model.generation_config).from_pretrained(source.folder)
    return model


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def load_tokenizer(source: ModelSource | str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the model's folder or repository. Raises ValueError if there is none or it is out of reach."""
    return ModelSource.of(source).tokenizer()


def skeleton(source: ModelSource | str | Path, dtype: str | None = None) -> PreTrainedModel:
    """The model on the meta device, operators included: all names and shapes, no weights; it reads config.json only.

    Args:
        dtype: of the parameters; "auto" and None are as in `load_model`.

    Raises ValueError if it is no model or cannot be reached.
    """
    _check_dtype(dtype)
    source = ModelSource.of(source)

    hf = _register()
    config = source.hf_config()
    with quiet(), explained(source.location):
        hf.read_packed(config)
        wanted = _dtype_of(config, source) if dtype in (None, "auto") else getattr(torch, str(dtype))
        with torch.device("meta"):
            model = hf.model_from(config, dtype=wanted)
        _keep_wide(model, wanted)
        compressed = getattr(config, "quantization_config", None)
        if compressed is not None:
            compressed = compressed.to_dict() if hasattr(compressed, "to_dict") else compressed
            hf.install_all(model, hf.StructuredConfig(**compressed))
            hf.attach(model)
    return model.eval()


def _is_foreign(source: ModelSource) -> bool:
    """Whether its weights are stored in a layout of another program that becomes plain once and for all."""
    found: dict[str, object] = source.config.get("quantization_config") or {}
    pack = None if found.get("quant_method") == "tensormix" else pack_of(found)
    return pack is not None and not pack.is_kept


def _is_packed(source: ModelSource) -> bool:
    """Whether the config says how codes are packed: then the loader holds every one of them to that."""
    found: dict[str, object] = source.config.get("quantization_config") or {}
    return bool(found) and (found.get("quant_method") != "tensormix" or bool(found.get("packed")))


def notes_on(source: ModelSource, model: PreTrainedModel) -> list[str]:
    """What has to be known of a source before anything is made of it, from its headers; `model` is its skeleton.

    Raises ValueError as `Assembly` does, if its weights are not those of the model.
    """
    if isinstance(source.location, str):
        return []
    if not source.has_weights:
        if source.config.get("dtype") or source.config.get("torch_dtype"):
            return []
        return ["config.json says no dtype, and there are no weights to ask: float32 is assumed"]
    unknown = Assembly(model, source.weights).unknown
    if not unknown:
        return []
    named = ", ".join(unknown[:3]) + (" and others" if len(unknown) > 3 else "")
    return [
        f"the checkpoint holds {len(unknown)} tensors that a {type(model).__name__} does not know ({named}): a "
        "compressed folder carries them on as they are, and a model in memory does not have them"
    ]


def _dtype_of(config: PreTrainedConfig, source: ModelSource) -> torch.dtype:
    """The dtype that `from_pretrained` takes by itself: that of the config, else of the first weight.

    Where nothing says it, as in a folder with a config alone, it is float32.
    """
    said = config.dtype if isinstance(config.dtype, torch.dtype) else None
    if said is not None or isinstance(source.location, str) or not source.has_weights:
        return said or torch.float32
    return main_dtype(source.entries.values()) or torch.float32


def _keep_wide(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Some architectures keep a few parameters in float32; `from_pretrained` knows, a skeleton has to be told."""
    found = model._get_dtype_plan(dtype)  # pyright: ignore[reportPrivateUsage]
    wide_names = cast("dict[str, torch.dtype]", found)
    patterns = [pattern.replace(".", r"\.").replace("*", ".*") for pattern in wide_names]
    for name, tensor in list(model.state_dict(keep_vars=True).items()) if patterns else []:
        if tensor.is_floating_point() and re.search("|".join(patterns), name):
            path, _, leaf = name.rpartition(".")
            wide = tensor.detach().float()
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            setattr(model.get_submodule(path), leaf, torch.nn.Parameter(wide) if is_parameter else wide)


def _register() -> ModuleType:
    # Here and not on top: the plugin imports transformers, which takes seconds.
    import tensormix.hf

    return tensormix.hf
