"""Where a model comes from, and loading it: a folder, the Hugging Face Hub or one file of weights; dense or compressed.

No code that a checkpoint brings along is ever run.
"""

from tensormix.models.loading import DTYPES, load_model, load_tokenizer, notes_on, skeleton
from tensormix.models.source import ModelSource, Sources, fingerprint, local_folder
from tensormix.sites.quiet import quiet
from tensormix.sites.twin import fill_buffers

__all__ = [
    "DTYPES",
    "ModelSource",
    "Sources",
    "fill_buffers",
    "fingerprint",
    "load_model",
    "load_tokenizer",
    "local_folder",
    "notes_on",
    "quiet",
    "skeleton",
]
