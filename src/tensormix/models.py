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

from tensormix.storage.checkpoint import Checkpoint
from tensormix.storage.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_SAMPLES, _SAMPLE = 256, 1 << 18  # a fingerprint reads at most this many pieces of this many bytes of each file
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_model(id_or_path: str | Path, dtype: str | None = None) -> PreTrainedModel:
    """The model in evaluation mode on the CPU.

    Args:
        id_or_path: a folder with config.json and safetensors, or a Hub id.
        dtype: one of `DTYPES`; "auto" and None keep the checkpoint's own. Weights that are packed in fp8 or MXFP4
            become plain ones, in bfloat16 if the config does not say.

    Raises:
        ValueError: it is no model, its weights are pickled, packed in another way, unreadable or incomplete, or it
            cannot be reached.
    """
    _check_dtype(dtype)
    source = _source(id_or_path)
    if isinstance(source, Path):
        Checkpoint(source)  # finds what is wrong with the files before a minute has passed
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = _register()
    with quiet(), _explained(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        hf.read_packed(config)
        options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype or "auto", **options)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{source}: the weights lack {', '.join(missing[:3])}{more}, which {type(model).__name__} needs; "
            "the checkpoint is incomplete or of another model"
        )
    return model


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def load_tokenizer(id_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the model's folder or repository. Raises ValueError if there is none or it is out of reach."""
    source = _source(id_or_path)
    if isinstance(source, Path) and not any(source.glob("tokenizer*")) and not (source / "vocab.json").exists():
        raise ValueError(f"{source} has no tokenizer (no tokenizer.json); copy the one of the original model there")
    from transformers import AutoTokenizer

    with quiet(), _explained(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def skeleton(id_or_path: str | Path, dtype: str | None = None) -> PreTrainedModel:
    """The model on the meta device, operators included: all names and shapes, no weights; it reads config.json only.

    Args:
        dtype: of the parameters; "auto" and None are as in `load_model`.

    Raises ValueError if it is no model or cannot be reached.
    """
    _check_dtype(dtype)
    source = _source(id_or_path)
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = _register()
    with quiet(), _explained(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        hf.read_packed(config)
        wanted = _dtype_of(config, source) if dtype in (None, "auto") else getattr(torch, str(dtype))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=wanted)
        _keep_wide(model, wanted)
        compressed: Any = getattr(config, "quantization_config", None)
        if compressed is not None:
            compressed = compressed if isinstance(compressed, dict) else compressed.to_dict()
            hf.install_all(model, hf.StructuredConfig(**compressed))
            hf.attach(model)
    return model.eval()


def _dtype_of(config: Any, source: Path | str) -> torch.dtype:
    """The dtype that `from_pretrained` takes by itself: that of the config, else of the first weight."""
    if config.dtype is not None or isinstance(source, str):
        return config.dtype or torch.float32
    entries = sorted(Checkpoint(source).entries.values(), key=lambda entry: (entry.file.name, entry.name))
    floats = [entry.torch_dtype for entry in entries if entry.is_float and entry.torch_dtype is not None]
    return next((dtype for dtype in floats if dtype.itemsize > 1), torch.float32)


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Some architectures keep a few parameters in float32; `from_pretrained` knows, a skeleton has to be told."""
    patterns = [pattern.replace(".", r"\.").replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    for name, tensor in list(model.state_dict(keep_vars=True).items()) if patterns else []:
        if tensor.is_floating_point() and re.search("|".join(patterns), name):
            path, _, leaf = name.rpartition(".")
            wide = tensor.detach().float()
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            setattr(model.get_submodule(path), leaf, torch.nn.Parameter(wide) if is_parameter else wide)


def fill_buffers(model: Any, device: str = "cpu") -> None:
    """Give a skeleton the buffers that no checkpoint holds (rotary frequencies and the like), as loading does, once."""
    buffers = [(name, buffer) for name, buffer in model.named_non_persistent_buffers() if buffer.is_meta]
    if not buffers:  # initialising leaves alone what was filled before, and would not fill new buffers either
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True  # so that what is missing is only the buffers made next
    for name, buffer in buffers:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = torch.empty_like(buffer, device=device)
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()


def local_folder(id_or_path: str | Path) -> Path:
    """The folder itself; of a Hub id the snapshot in the local cache, fetched first where it is missing.

    Raises ValueError if it is no model or cannot be reached.
    """
    source = _source(id_or_path)
    if isinstance(source, Path):
        return source
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
    with quiet(), _explained(source):
        folder = Path(snapshot_download(source, allow_patterns=wanted))
    _source(folder)
    return folder


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


def _strict_errors() -> tuple[type[Exception], ...]:
    """What configs raise that check themselves."""
    from huggingface_hub.errors import StrictDataclassError

    return (StrictDataclassError,)


@contextmanager
def _explained(source: Path | str) -> Iterator[None]:
    """What transformers raises, as a ValueError that says what was tried."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, *_strict_errors()) as error:
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
