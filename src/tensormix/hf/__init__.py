"""The plugin of transformers: importing it lets `save_pretrained` and `from_pretrained` know compressed models."""

from tensormix.hf.classes import class_of, model_from
from tensormix.hf.contents import fitted_blocks, install_empty, operators_of
from tensormix.hf.plugin import (
    StructuredConfig,
    StructuredQuantizer,
    attach,
    attach_parts,
    forget_pack,
    install_all,
    read_packed,
    refuse_tensor_parallelism,
    unmark,
)

__all__ = [
    "StructuredConfig",
    "StructuredQuantizer",
    "attach",
    "attach_parts",
    "class_of",
    "fitted_blocks",
    "forget_pack",
    "install_all",
    "install_empty",
    "model_from",
    "operators_of",
    "read_packed",
    "refuse_tensor_parallelism",
    "unmark",
]
