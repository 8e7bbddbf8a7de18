"""Which class of transformers a checkpoint is read as."""

from __future__ import annotations

from typing import Any

_OF_TEXT = "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"
# Of models that write no text: the hidden states themselves, or a head that is no language model's.
_OTHERS = ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
           "AutoModelForQuestionAnswering")  # fmt: skip


def class_of(config: Any) -> Any:
    """The causal language model of a config; of a model of text and images or sound the class that the config names.

    What is read as the whole model is written as the whole model too, with everything that is not text. A model
    with another head than for text is read as what it is, and one with none too, unless tied embeddings are its head.
    """
    import transformers

    choices = [getattr(transformers, kind) for kind in _OF_TEXT]
    known = [choice for choice in choices if type(config) in choice._model_mapping]
    for name in config.architectures or ():
        named: Any = getattr(transformers, name, None)
        if hasattr(named, "get_output_embeddings") and isinstance(config, named.config_class or ()):
            if hasattr(config, "text_config") or not known or _other(config, name):
                return named
    return [*known, *choices][0]


def _other(config: Any, name: str) -> bool:
    """Whether this class of the config writes no text: it has another head, or none and no tied embeddings either."""
    import transformers

    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    kinds = _OTHERS[1:] if tied else _OTHERS
    mappings = [getattr(transformers, kind)._model_mapping for kind in kinds]
    found = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    classes = [one for several in found for one in (several if isinstance(several, tuple) else (several,))]
    return name in {one.__name__ for one in classes}


def model_from(config: Any, **options: Any) -> Any:
    """A model of this config, with weights as they are drawn."""
    kind = class_of(config)
    return (kind.from_config if hasattr(kind, "from_config") else kind._from_config)(config, **options)
