"""Train the study's mid-size model: 12 Llama blocks of width 256, 8.1 M parameters, from scratch on plain English text.

    python studies/quality/train_midsize.py --data ../shared/data --out /tmp/midsize

The windows of a step are a function of the step's number, so a run that is stopped goes on as if it had not been. The
learning rate is constant until the last fifth and then falls to zero, so `--steps` only moves the end. No block is
skipped while training: the study needs late blocks that matter. The head is not tied to the embedding, as in the
published models of 7 B parameters; `--seed` gives sisters of the model, for judging what is fitted on one of them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from text import parts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

WINDOW, BATCH, VOCABULARY = 256, 16, 2048
RATES = (2e-3, 3e-3)  # peak learning rates: Muon for the matrices, AdamW for the rest
DECAY = 0.2  # share of the steps in which the rate falls
END = "<|endoftext|>"
CONFIG = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=512
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:  # (tokens,)
    return torch.tensor([token for ids in tokenizer(texts, verbose=False)["input_ids"] for token in ids])


def step_windows(stream: Tensor, step: int, seed: int) -> Tensor:  # (B, T + 1)
    generator = torch.Generator().manual_seed(step + 1_000_000 * seed)
    starts = torch.randint(len(stream) - WINDOW, (BATCH, 1), generator=generator)
    return stream[starts + torch.arange(WINDOW + 1)]


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: warm-up of 50, constant, linear to zero over the last fifth."""
    return min(1.0, (step + 1) / 50, (steps - step) / (DECAY * steps))


Loss = Callable[[Any, Tensor], Tensor]  # of a model on windows (B, T + 1)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, stream: Tensor, num_windows: int, loss_of: Loss = loss_of) -> float:
    """Of the first windows of a packed stream, without overlap."""
    windows = stream[: num_windows * (WINDOW + 1)]
    windows = windows[: len(windows) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    losses = [loss_of(model, batch) * len(batch) for batch in windows.split(BATCH)]
    return math.exp(sum(map(float, losses)) / len(windows))


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return [
        torch.optim.Muon(matrices, lr=RATES[0], weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATES[1], weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def resume(file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """The step to go on with, and the seconds that were spent before; zeros without a file."""
    if not file.exists():
        return 0, 0.0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]


def keep(file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, seconds: float) -> None:
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(state | {"step": step, "seconds": seconds}, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def dense_model(vocabulary: int) -> nn.Module:
    config = LlamaConfig(**CONFIG, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).float()


def train(args: argparse.Namespace, make: Callable[[int], Any] = dense_model, loss_of: Loss = loss_of) -> None:
    """`make` gives the model for a number of tokens in the vocabulary."""
    torch.manual_seed(args.seed)
    texts = parts(args.data)
    tokenizer = make_tokenizer(texts["pretraining"])
    streams = {name: pack(tokenizer, texts[name]) for name in ("pretraining", "in_domain", "held_out")}
    model = make(len(tokenizer))
    optimizers = make_optimizers(model)
    training_loss = torch.compile(loss_of, dynamic=False)  # a third faster
    state_file = args.out / "state.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    first, seconds = resume(state_file, model, optimizers)
    for step in range(first, args.steps):
        began = time.perf_counter()
        for optimizer, peak in zip(optimizers, RATES, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, args.steps)
        loss = training_loss(model, step_windows(streams["pretraining"], step, args.seed))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds += time.perf_counter() - began
        last = step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or last:
            row = {"seed": args.seed, "step": step + 1, "steps": args.steps, "tokens": (step + 1) * BATCH * WINDOW}
            row["loss"] = loss.item()
            row |= {"epochs": row["tokens"] / len(streams["pretraining"]), "grad_norm": norm.item(), "seconds": seconds}
            num_windows = 1000 if last else 64
            row |= {name: perplexity(model, streams[name], num_windows, loss_of) for name in ("in_domain", "held_out")}
            row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            with args.log.open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)
            keep(state_file, model, optimizers, step + 1, seconds)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


def arguments(description: str, log: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and instruct/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--log", type=Path, default=log)
    return parser.parse_args()


if __name__ == "__main__":
    train(arguments(__doc__.splitlines()[0], Path(__file__).with_name("midsize.jsonl")))
