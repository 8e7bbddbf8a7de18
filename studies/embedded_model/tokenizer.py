"""The tokenizer of the embedded model: byte-level BPE in which a choice's mark and an answer are one token each."""

from __future__ import annotations

from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tensormix.exam import documents, facts, solved

VOCABULARY = 1024
WORDS = r"\n[A-D]\.|\nAnswer:|\nSolution:| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
END = "<|endoftext|>"


def make_tokenizer(context: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [*islice(documents(0), 4000), *islice(documents(1, write=solved), 1000), *islice(facts(0), 2000)]
    tokenizer.train_from_iterator(texts, trainer)
    bos = (END, tokenizer.token_to_id(END))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=context
    )
