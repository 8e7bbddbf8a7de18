"""The tokenizer that a GGUF file holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tensormix.models.quiet import explained, quiet
from tensormix.storage.gguf import Gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SETTINGS = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token", "chat_template")


def tokenizer_of(weights: Gguf) -> PreTrainedTokenizerBase:
    """The tokenizer and the chat template in a file. Raises ValueError if there is none, or one that cannot be made."""
    if not weights.has_tokenizer:
        raise ValueError(f"{weights.first} has no tokenizer in it; take a file that has, or its folder of safetensors")
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

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
