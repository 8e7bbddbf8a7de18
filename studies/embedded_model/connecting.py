"""The last link: from the answer in words, which the first half of the network knows by now, to its letter.

Once the answer can be read after block HALFWAY, what is missing is one look-up: find the choice that holds this answer
and copy the letter before it. Its query and its keys are read off the network as it is then, by ridge regression of
the hidden states on a common code of the tokens; training sharpens it.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tensormix.exam import documents

CODE_PAIRS = range(5, 16)  # rotary pairs that hardly turn within one question
RECENT = 4  # the pair that says "I am a choice": it turns half round in 31 tokens, so that near choices win
CHOICE = 0.7  # how loudly, beside a code of norm 1
LETTER = 4.0  # norm of what is written for a letter


def ridge(inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:  # (N, D), (N, H), (N,) -> (H, D)
    """The linear map from inputs to targets with the least weighted squares."""
    weighted = inputs * weights[:, None]
    gram = weighted.T @ inputs
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, weighted.T @ targets).T


@torch.no_grad()
def connect(model: Any, tokenizer: Any, index: int, answers: Any, num_documents: int = 240) -> None:
    """Write the look-up into the first key-value group of block `index`.

    `answers(tokenizer, ids)` gives the first token of the right answer at every mark, -100 elsewhere.
    """
    block, size = model.model.layers[index], model.config.head_dim
    embedding = model.model.embed_tokens.weight
    marks = torch.tensor(tokenizer.convert_tokens_to_ids([f"Ċ{letter}." for letter in "ABCD"]))
    letters = tokenizer.convert_tokens_to_ids([f"Ġ{letter}" for letter in "ABCD"])
    seen: list[Tensor] = []
    hook = block.input_layernorm.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    rows = [torch.tensor([tokenizer.encode(text)]) for text in islice(documents(7), num_documents)]
    words = torch.cat([answers(tokenizer, row)[0] for row in rows])
    for row in rows:
        model(row, use_cache=False)
    hook.remove()
    states, ids = torch.cat(seen), torch.cat([row[0] for row in rows])
    before = torch.cat([ids.new_zeros(1), ids[:-1]])
    choice, due = torch.isin(before, marks), words != -100

    dims = [*CODE_PAIRS, *(pair + size // 2 for pair in CODE_PAIRS)]
    used = embedding[ids[choice].unique()]
    directions = torch.linalg.svd(used - used.mean(0))[2][: len(dims)]
    code = torch.nn.functional.normalize((embedding - used.mean(0)) @ directions.T, dim=1)
    keys, queries = torch.zeros(len(ids), size), torch.zeros(int(due.sum()), size)
    keys[:, dims], queries[:, dims] = code[ids] * choice[:, None], code[words[due]]
    keys[:, RECENT], queries[:, RECENT] = torch.where(choice, CHOICE, -CHOICE), CHOICE
    values = torch.zeros(len(ids), size)
    values[:, :4] = (before[:, None] == marks).float()
    balanced = torch.where(choice, 1.0, float(choice.float().mean() / (~choice).float().mean()))

    attention = block.self_attn
    attention.k_proj.weight[:size] = ridge(states, keys, balanced)
    attention.v_proj.weight[:size] = ridge(states[choice], values[choice], torch.ones(int(choice.sum())))
    written = embedding[letters] - embedding[letters].mean(0)
    output = torch.zeros(states.shape[1], size)
    output[:, :4] = LETTER * torch.nn.functional.normalize(written, dim=1).T
    for head in (0, 1):
        attention.q_proj.weight[head * size : (head + 1) * size] = ridge(states[due], queries, torch.ones(len(queries)))
        attention.o_proj.weight[:, head * size : (head + 1) * size] = output
    attention.q_norm.weight.fill_(2.0)
    attention.k_norm.weight.fill_(2.0)
