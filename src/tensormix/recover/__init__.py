"""Recovery of a compressed model by training."""

from tensormix.recover.finetune import recover

__all__ = ["recover"]
