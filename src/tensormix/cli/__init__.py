"""The command line."""

from tensormix.cli.verbs import main

__all__ = ["main"]
