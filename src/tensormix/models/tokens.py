"""The tokenizer that a GGUF file holds."""

# transformers and huggingface_hub say few of their types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tensormix.models.explained import explained
from tensormix.sites.quiet import quiet
from tensormix.storage.gguf import Gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ways to cut a text into words that are GPT-2's, or come to the same with a vocabulary that keeps digits apart.
_GPT2 = {
    "default", "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "a.x-4.0", "mellum", "modern-bert", "mpt", "olmo",
    "jais", "trillion", "granite-docling", "starcoder", "refact", "command-r", "smollm", "codeshell", "exaone",
    "minerva-7b", "roberta-bpe",
}  # fmt: skip
_SETTINGS = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token", "chat_template")


def tokenizer_of(weights: Gguf) -> PreTrainedTokenizerBase:
    """The tokenizer and the chat template in a file. Raises ValueError if there is none, or one that cannot be made."""
    if not weights.has_tokenizer:
        raise ValueError(f"{weights.first} has no tokenizer in it; take a file that has, or its folder of safetensors")
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind, cut = (weights.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "gpt2" and cut is not None and cut not in _GPT2 and cut not in GGUF_PRE_TOKENIZER_SPLITS:
        raise ValueError(
            f"{weights.first} cuts texts into words the way of {cut!r}, which is not known here: its tokenizer would "
            "give other tokens. Put the tokenizer.json of the original model beside the file, and name their folder"
        )

    count = weights.metadata["tokenizer.ggml.tokens"]
    with quiet(), explained(weights.first):
        made = PreTrainedTokenizerFast.from_pretrained(weights.folder, gguf_file=weights.first.name)
        # transformers adds the usual tokens of the class that it makes; the model has no rows for those.
        content = json.loads(made.backend_tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < count]
        backend = Tokenizer.from_str(json.dumps(content))
        settings = {key: made.init_kwargs.get(key) for key in _SETTINGS if made.init_kwargs.get(key) is not None}
        known = backend.get_vocab()
        wrong = [key for key, token in settings.items() if key.endswith("_token") and str(token) not in known]
        for key in (key for key in wrong if not key.startswith("add_")):
            del settings[key]
        settings.setdefault("chat_template", made.chat_template)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
