"""Which class of transformers a checkpoint is read as."""

from __future__ import annotations

from typing import Any


def class_of(config: Any) -> Any:
    """The causal language model of a config; of a model of text and images or sound the class that the config names.

    What is read as the whole model is written as the whole model too, with everything that is not text.
    """
    import transformers

    for name in config.architectures or () if hasattr(config, "text_config") else ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and hasattr(named, "get_output_embeddings"):
            return named
    choices = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    return next((choice for choice in choices if type(config) in choice._model_mapping), choices[0])


def model_from(config: Any, **options: Any) -> Any:
    """A model of this config, with weights as they are drawn."""
    kind = class_of(config)
    return (kind.from_config if hasattr(kind, "from_config") else kind._from_config)(config, **options)
