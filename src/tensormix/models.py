"""Load a model, its tokenizer or its skeleton from a folder or the Hugging Face Hub, dense or compressed.

Weights come from safetensors only, and no code that a checkpoint brings along is ever run. transformers' progress bars
and warnings are silenced: what would make a model wrong is an error here.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tensormix.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SAMPLES, _SAMPLE = 256, 1 << 18  # a fingerprint reads at most this many pieces of this many bytes of each file
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_model(id_or_path: str | Path, dtype: str | None = None) -> PreTrainedModel:
    """The model in evaluation mode on the CPU.

    Args:
        id_or_path: a folder with config.json and safetensors, or a Hub id.
        dtype: one of `DTYPES`; "auto" and None keep the checkpoint's own.

    Raises:
        ValueError: it is no model, its weights are pickled, unreadable or incomplete, or it cannot be reached.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    source = _source(id_or_path)
    if isinstance(source, Path):
        _check_weights(source)
    from transformers import AutoModelForCausalLM

    _register()
    with quiet(), _explained(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{source}: the weights lack {', '.join(missing[:3])}{more}, which {type(model).__name__} needs; "
            "the checkpoint is incomplete or of another model"
        )
    return model


def load_tokenizer(id_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the model's folder or repository. Raises ValueError if there is none or it is out of reach."""
    source = _source(id_or_path)
    if isinstance(source, Path) and not any(source.glob("tokenizer*")) and not (source / "vocab.json").exists():
        raise ValueError(f"{source} has no tokenizer (no tokenizer.json); copy the one of the original model there")
    from transformers import AutoTokenizer

    with quiet(), _explained(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def skeleton(id_or_path: str | Path) -> PreTrainedModel:
    """The model on the meta device, operators included: all names and shapes, no weights; it reads config.json only.

    Raises ValueError if it is no model or cannot be reached.
    """
    source = _source(id_or_path)
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = _register()
    with quiet(), _explained(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        compressed: Any = getattr(config, "quantization_config", None)
        if compressed is not None:
            compressed = compressed if isinstance(compressed, dict) else compressed.to_dict()
            hf.install_empty(model, hf.StructuredConfig(**compressed).operators)
            hf.attach(model)
    return model.eval()


def fingerprint(id_or_path: str | Path) -> str:
    """A short hash that changes when the model in a folder does: its config, and of every weights file the size, the
    header and evenly spread samples (all of a small file). Of a Hub id it is the id.

    Raises ValueError if it is no model.
    """
    source = _source(id_or_path)
    if isinstance(source, str):
        return f"hub:{source}"
    digest = hashlib.blake2b(digest_size=8)
    for file in [source / "config.json", *sorted(source.glob("*.safetensors"))]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as handle:
            if size <= _SAMPLES * _SAMPLE:
                digest.update(handle.read())
            else:
                for number in range(_SAMPLES):
                    handle.seek(number * (size - _SAMPLE) // (_SAMPLES - 1))
                    digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()


def _register() -> Any:
    # Here and not on top: the plugin imports transformers, which takes seconds.
    import tensormix.hf

    return tensormix.hf


def _source(id_or_path: str | Path) -> Path | str:
    """A folder that holds a config.json, or a Hub id."""
    folder = Path(id_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} is not a model folder: it has no config.json")
        _check_config(folder / "config.json")
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; a model is a folder with config.json and safetensors, or a Hub id")
    text = str(id_or_path)
    if isinstance(id_or_path, Path) or not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise ValueError(f"{text} is neither a folder that exists nor a Hub id such as 'owner/name'")
    return text


def _check_config(path: Path) -> None:
    config = read_json(path)
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} does not describe a transformers model: it has no model_type")
    if "auto_map" in config and not _known_type(config["model_type"]):
        raise ValueError(
            f"{path} asks for code of its own (model_type {config['model_type']!r}); "
            "tensormix never runs code from a checkpoint"
        )


def _known_type(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _check_weights(folder: Path) -> None:
    """Raise ValueError, naming the file, unless the folder's safetensors are all there and readable."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if not files:
        pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
        if pickled:
            raise ValueError(
                f"{folder} has pickled weights ({pickled[0]}), which can run code when they are read; convert them "
                "where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) "
                "writes safetensors"
            )
        raise ValueError(f"{folder} has a config.json but no weights (*.safetensors)")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except FileNotFoundError:
            raise ValueError(f"{file} is missing, but {index.name} names it") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or cut off ({error}); fetch it again") from error


@contextmanager
def _explained(source: Path | str) -> Iterator[None]:
    """What transformers raises, as a ValueError that says what was tried."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        if isinstance(source, Path):
            raise ValueError(f"{source} could not be loaded: {reason}") from error
        raise ValueError(
            f"{source!r} could not be loaded: there is no folder of that name here, and as a Hub id it was neither "
            f"in the local cache nor to be had from the Hub ({reason})"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and warnings; both come back afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
