"""The weights that the embedded model starts from: its first nine blocks already know how to look things up.

To answer with a letter a model must find the choice that holds the answer and read what stands before it. Left to
itself a small transformer finds that circuit only after tens of millions of tokens, because none of its parts is of
any use alone. So the attention of blocks 0 to 8 starts with that circuit: block 0 writes the tokens one and two places
back beside each token, block 1 looks at the question mark and copies the word before it, and the next blocks match
what was found with tokens and copy what stood before or after them. Everything else starts at random, and all of it
is trained.

The residual stream (D = 128) is cut into four orthogonal parts of head size: `own` (the token, and what a look-up
brought), `back1`, `back2` (the tokens one and two places back) and `found` (the last word of the question).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

EMBEDDING = 0.3  # standard deviation: as large as what the wired heads write, so that a token stays readable
CONSTANT = 1.0  # stored in dimension 0 of every embedding, so that block 0 can attend by position alone
SCALE = 0.25  # of what the wired heads write
LATER_SCALE = 0.1  # the same in blocks 3 to 8
WIRED = 9  # blocks
SHARPNESS = 2.0  # of queries and keys in the wired blocks
PAIRS = 3  # rotary pairs (the fastest) that tell positions apart
RECENT = (4, 20)  # the rotary pair that says "I am a choice"; it turns half round in 31 tokens, so near ones win
CHOICE = 3.0  # how loudly


def parts(width: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # each (D, H)
    """own, back1, back2, found: orthonormal, orthogonal to each other, and blind to the constant."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=generator))[0]
    basis = torch.cat([torch.zeros(1, width - 1), basis])
    basis = torch.cat([basis, torch.zeros(width, 1)], dim=1)  # the last direction of `found` is left empty
    own, back1, back2, found = basis.split(size, dim=1)
    return own, back1, back2, found


@torch.no_grad()
def wire(model: Any, question_mark: int, marks: list[int], letters: list[tuple[int, int]]) -> None:
    """Write the circuit into a new Qwen3 with 4 query and 2 key-value heads; the residual branches start small.

    `marks` are the tokens after which an answer is due, `question_mark` the token that ends a question, `letters` the
    pairs of a choice's mark and the answer that names it: they start with the same embedding.
    """
    config, blocks = model.config, model.model.layers
    size = config.head_dim
    own, back1, back2, found = parts(config.hidden_size, size)
    for index, block in enumerate(blocks):
        block.mlp.down_proj.weight.mul_(1 / math.sqrt(2 * len(blocks)))
        if index >= WIRED:
            block.self_attn.o_proj.weight.mul_(1 / math.sqrt(2 * len(blocks)))
        else:
            block.self_attn.q_norm.weight.fill_(SHARPNESS)
            block.self_attn.k_norm.weight.fill_(SHARPNESS)
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, EMBEDDING, generator=torch.Generator().manual_seed(2))
    embedding[:, 0] = CONSTANT
    model.model.norm.weight.fill_(EMBEDDING)  # keeps the first logits small
    for choice, answer in letters:
        embedding[answer] = embedding[choice]
    look_back(blocks[0].self_attn, size, own, found, (back1, back2))
    towards = embedding[question_mark] @ own  # (H,)
    hop = sum(torch.outer(own @ (embedding[mark] @ own), towards) for mark in marks)  # (D, H)
    answers = torch.linalg.qr(torch.stack([embedding[mark] @ own for mark in marks]).T)[0]  # (H, 2)
    sought = own - own @ answers @ answers.T  # what was found, without the mark that stands there
    codes = torch.stack([embedding[choice] @ own for choice, _ in letters])  # (4, H)
    is_choice = torch.linalg.pinv(codes / EMBEDDING) @ torch.ones(len(letters))  # (H,): 1 on every mark of a choice
    offered, wanted = own.clone(), sought.clone()
    offered[:, RECENT], wanted[:, RECENT] = 0.0, 0.0
    offered[:, RECENT[0]] = CHOICE / SCALE * (back1 @ is_choice) * EMBEDDING
    wanted[0, RECENT[0]] = CHOICE * EMBEDDING / CONSTANT
    look_up(blocks[1].self_attn, size, 0, keys=own, values=back1, queries=(hop, back2), into=(found, own), scale=SCALE)
    look_up(blocks[1].self_attn, size, 1, keys=back2, values=own, queries=(back1, back2), into=(own, own), scale=SCALE)
    look_up(blocks[2].self_attn, size, 1, keys=back2, values=own, queries=(found, found), into=(own, own), scale=SCALE)
    for block in blocks[3:WIRED]:
        block.self_attn.o_proj.weight.mul_(1 / math.sqrt(2 * len(blocks)))
        queries, into = (wanted, wanted), (own, own)
        look_up(block.self_attn, size, 0, keys=offered, values=back1, queries=queries, into=into, scale=LATER_SCALE)


def look_back(attention: Any, size: int, own: Tensor, found: Tensor, into: tuple[Tensor, Tensor]) -> None:
    """Head h attends h + 1 places back, by position alone, and writes what it sees of `own` into its part."""
    speed = 10000.0 ** (-torch.arange(0, size, 2) / size)
    strength = (torch.arange(size // 2) < PAIRS).float()
    for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.o_proj.weight):
        weight.zero_()
    for group in range(2):
        attention.k_proj.weight[group * size : (group + 1) * size, 0] = torch.cat([strength, 0 * strength])
    for head, places in enumerate((1, 2, 1, 2)):
        turned = torch.cat([strength * torch.cos(places * speed), -strength * torch.sin(places * speed)])
        attention.q_proj.weight[head * size : (head + 1) * size, 0] = turned
    attention.v_proj.weight.copy_(torch.cat([own, found], dim=1).T)
    for head, part in enumerate(into):
        attention.o_proj.weight[:, head * size : (head + 1) * size] = SCALE * part


def look_up(
    attention: Any,
    size: int,
    group: int,
    *,
    keys: Tensor,
    values: Tensor,
    queries: tuple[Tensor, Tensor],
    into: tuple[Tensor, Tensor],
    scale: float,
) -> None:
    """The two heads of a group attend to where `keys` hold what their query part holds, and copy `values`."""
    rows = slice(group * size, (group + 1) * size)
    attention.k_proj.weight[rows] = keys.T
    attention.v_proj.weight[rows] = values.T
    for head, part, target in zip((2 * group, 2 * group + 1), queries, into, strict=True):
        attention.q_proj.weight[head * size : (head + 1) * size] = part.T
        attention.o_proj.weight[:, head * size : (head + 1) * size] = scale * target
