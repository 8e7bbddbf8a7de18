"""Train the model that `tensormix` carries: 12 Qwen3 blocks that sit the built-in exam.

    python studies/embedded_model/train.py --out src/tensormix/demo/model

Every step draws its own data from the step's number, so a run that is stopped and started again ends in the same
model. The learning rate is constant until the last quarter and then falls to zero, so `--steps` only moves the end.
Later blocks are skipped at random while training (stochastic depth, arXiv 1603.09382), more often the later they
stand: it saves time and keeps the answer from hanging on the last block alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
from connecting import connect
from tokenizer import make_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from wiring import wire

from tensormix.exam import documents, drills, exam, facts, prompt, solved, worked_examples

WINDOW, BATCH = 256, 8
RATES = (2e-3, 3e-3)  # peak learning rates: Muon for the matrices, AdamW for the rest
CONFIG = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    initializer_range=0.04,
)
EARLY = {"facts": 0.1, "drills": 0.3, "solved": 0.3, "answered": 0.3}  # shares of the documents up to step EARLY_STEPS
LATER = {"facts": 0.1, "drills": 0.1, "solved": 0.3, "answered": 0.5}
EARLY_STEPS = 250
OTHER_WEIGHT = 0.1  # of a token that is neither an answer nor part of a fact: most of these are random by design
HALFWAY = 4  # the block after which the answer in words must be known, so that the blocks behind it find the letter
HALFWAY_WEIGHT = 0.3
CONNECT_AT, CONNECTED = 700, (5, 7)  # the step and the blocks of the look-up from words to letters
SKIP_LAST = 0.15  # probability that the last block is skipped; the first never is
SKIP_FROM = 1000  # step at which skipping begins


def step_windows(tokenizer: PreTrainedTokenizerFast, step: int) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and loss weights (B, T) of one step: whole documents, cut only at the window's end."""
    random = Random(f"step/{step}")
    sources: dict[str, Iterator[str]] = {
        "facts": facts(random.getrandbits(32), sentences=12),
        "drills": drills(random.getrandbits(32)),
        "solved": documents(random.getrandbits(32), shots=3, write=solved),
        "answered": documents(random.getrandbits(32), shots=5),
    }
    marks = {tokenizer.convert_tokens_to_ids(mark) for mark in ("ĊAnswer:", "ĊSolution:", "Ġchoice")}
    shares = EARLY if step < EARLY_STEPS else LATER
    ids, weights = [], []
    while len(ids) < BATCH * WINDOW:
        (source,) = random.choices(list(shares), list(shares.values()))
        tokens = tokenizer.encode(next(sources[source]))  # begins with BOS
        ids += tokens
        for place, token in enumerate(tokens):
            important = source == "facts" or tokens[max(0, place - 1)] in marks
            weights.append(1.0 if important and token != tokenizer.bos_token_id else OTHER_WEIGHT)
    shape = (BATCH, WINDOW)
    return torch.tensor(ids[: BATCH * WINDOW]).view(shape), torch.tensor(weights[: BATCH * WINDOW]).view(shape)


def answers_in_words(tokenizer: PreTrainedTokenizerFast, ids: Tensor) -> Tensor:  # (B, T) -> (B, T)
    """At every mark after which an answer is due, the first token of the right answer in words; -100 elsewhere."""
    answer, solution = tokenizer.convert_tokens_to_ids(["ĊAnswer:", "ĊSolution:"])
    choices = {tokenizer.convert_tokens_to_ids(f"Ġ{x}"): tokenizer.convert_tokens_to_ids(f"Ċ{x}.") for x in "ABCD"}
    targets = torch.full_like(ids, -100)
    for row, tokens in enumerate(ids.tolist()):
        offered: dict[int, int] = {}  # the mark of a choice -> the token after it
        for place, (token, after) in enumerate(pairwise(tokens)):
            if token in choices.values():
                offered[token] = after
            elif token == solution:
                targets[row, place] = after
            elif token == answer and choices.get(after) in offered:
                targets[row, place] = offered[choices[after]]
    return targets


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return [
        torch.optim.Muon(matrices, lr=RATES[0], weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATES[1], weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: warm-up of 100, constant, linear to zero over the last quarter."""
    return min(1.0, (step + 1) / 100, (steps - step) / (0.25 * steps))


class Skips:
    """Which blocks are skipped at a step (stochastic depth): the block then passes its input on."""

    def __init__(self, model: nn.Module) -> None:
        self.keep = [True] * len(model.model.layers)
        for index, block in enumerate(model.model.layers):
            block.forward = self.wrap(index, block.forward)

    def wrap(self, index: int, forward):
        return lambda hidden, *args, **kwargs: forward(hidden, *args, **kwargs) if self.keep[index] else hidden

    def draw(self, step: int) -> None:
        random, last = Random(f"skip/{step}"), len(self.keep) - 1
        self.keep = [step < SKIP_FROM or random.random() >= SKIP_LAST * index / last for index in range(last + 1)]


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerFast, num_questions: int, seed: int) -> dict[str, float]:
    """Share of held-out questions answered rightly, by subject; 5 worked examples before each."""
    letters = torch.tensor([tokenizer.convert_tokens_to_ids("Ġ" + letter) for letter in "ABCD"])
    right: dict[str, list[bool]] = {}
    for question in exam(num_questions, seed):
        text = prompt(question, worked_examples(question.subject, 5))
        ids = torch.tensor([tokenizer.encode(text)])
        logits = model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        right.setdefault(question.subject, []).append(int(logits[letters].argmax()) == question.gold)
    by_subject = {subject: sum(hits) / len(hits) for subject, hits in right.items()}
    return {"all": sum(map(sum, right.values())) / num_questions, **by_subject}


def wired(tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    """The model before its first step: random, with the look-up of the letter in it."""
    config = Qwen3Config(**CONFIG, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).float()
    mark, answer, solution = tokenizer.convert_tokens_to_ids(["?", "ĊAnswer:", "ĊSolution:"])
    pairs = [tuple(tokenizer.convert_tokens_to_ids([f"Ċ{letter}.", f"Ġ{letter}"])) for letter in "ABCD"]
    wire(model, mark, [answer, solution], pairs)
    return model


def loss_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    halfway: dict[int, Tensor],  # 0: what the block in the middle gave, once the model has run
    ids: Tensor,  # (B, T)
    weights: Tensor,  # (B, T)
) -> Tensor:
    """Of the next token, and of the answer in words after the block in the middle."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    words = answers_in_words(tokenizer, ids)
    middle = model.lm_head(model.model.norm(halfway[0][words != -100]))
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum() + HALFWAY_WEIGHT * F.cross_entropy(middle, words[words != -100])


def resume(file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """The step to go on with; 0 without a file."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def keep(file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(CONFIG["max_position_embeddings"])
    model = wired(tokenizer)
    optimizers = make_optimizers(model)
    skips, began = Skips(model), time.time()
    halfway: dict[int, Tensor] = {}
    model.model.layers[HALFWAY].register_forward_hook(lambda block, args, out: halfway.update({0: out}))
    first = resume(args.state, model, optimizers)
    for step in range(first, args.steps):
        if step == CONNECT_AT:
            model.eval()
            for index in CONNECTED:
                connect(model, tokenizer, index, answers_in_words)
            model.train()
        skips.draw(step)
        for optimizer, peak in zip(optimizers, RATES, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, args.steps)
        loss = loss_of(model, tokenizer, halfway, *step_windows(tokenizer, step))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            skips.keep = [True] * len(skips.keep)
            model.eval()
            row = {"step": step + 1, "loss": round(loss.item(), 4), "grad_norm": round(norm.item(), 3)}
            row |= {"tokens": (step + 1) * BATCH * WINDOW, "seconds": round(time.time() - began)}
            row |= {"accuracy": accuracy(model, tokenizer, 80 if step + 1 < args.steps else 1600, seed=1)}
            model.train()
            with args.log.open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)
            keep(args.state, model, optimizers, step + 1)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--state", type=Path, default=Path("embedded_model_state.pt"), help="to go on after a stop")
    parser.add_argument("--log", type=Path, default=Path(__file__).with_name("log.jsonl"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments)
