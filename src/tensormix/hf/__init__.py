"""The plugin of transformers: importing it lets `save_pretrained` and `from_pretrained` know compressed models."""

from tensormix.hf.plugin import StructuredConfig, attach, install_empty, operators_of, refuse_tensor_parallelism, unmark

__all__ = ["StructuredConfig", "attach", "install_empty", "operators_of", "refuse_tensor_parallelism", "unmark"]
