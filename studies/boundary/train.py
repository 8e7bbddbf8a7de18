"""Train the study's models from scratch: small Llama decoders that answer a kind of question each.

Nothing is wired or connected by hand. Some models skip blocks at random while training (stochastic depth, arXiv
1603.09382); `models.yaml` says which, and how often. The batches of a step are a function of the
step's number and the seed. A row per model goes to training.jsonl.
"""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tasks import documents, make_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from tensormix.storage.files import environment, now

HERE = Path(__file__).parent
RATES = (2e-3, 3e-3)  # peak learning rates: Muon for the matrices of the blocks, AdamW for the rest
OTHER_WEIGHT = 0.1  # of the loss of a token that is no answer: most of these are random by design
ENOUGH = 0.98  # running accuracy on the training texts at which the rate begins to fall
Settings = dict[str, Any]


def config_of(settings: Settings, vocabulary: int) -> LlamaConfig:
    width = settings["width"]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=settings["blocks"],
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.05,
    )


def batch(tokenizer: Any, settings: Settings, stream: Any) -> Tensor:  # (B, T)
    return torch.tensor(tokenizer(list(islice(stream, settings["batch"])))["input_ids"])


def skip_rates(settings: Settings) -> list[float]:
    """Of every block how often it is skipped at first: `skips`, or from 0 at the first to `skip` at the last.

    A model that is grown begins with the blocks of `grown_from` alone; the others join once these know enough.
    """
    last = settings["blocks"] - 1
    if "grown_from" in settings:
        return [float(index not in settings["grown_from"]) for index in range(last + 1)]
    return settings.get("skips") or [settings["skip"] * index / last for index in range(last + 1)]


def skipping(model: nn.Module, rates: list[float], random: Random) -> None:
    """From now on each block passes its input on at random, as often as `rates` says at the time, while training."""

    def wrap(index: int, forward: Any) -> Any:
        return lambda hidden, *args, **kwargs: (
            hidden if model.training and random.random() < rates[index] else forward(hidden, *args, **kwargs)
        )

    for index, block in enumerate(model.model.layers):  # type: ignore[union-attr]
        block.forward = wrap(index, block.forward)


class BatchedMuon:
    """Muon (Jordan et al. 2024), all matrices of a shape in one product: of small ones most of the time is overhead."""

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        shapes = dict.fromkeys(tuple(sorted(matrix.shape)) for matrix in matrices)
        self.groups = [[m for m in matrices if tuple(sorted(m.shape)) == shape] for shape in shapes]
        for matrix in matrices:
            matrix.grad = torch.zeros_like(matrix)  # so that a block that is skipped has one
        self.momenta = [torch.zeros(len(group), *shape) for group, shape in zip(self.groups, shapes, strict=True)]

    @torch.no_grad()
    def step(self, rate: float, decay: float = 0.05) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradients = torch.stack([m.grad if m.shape[0] <= m.shape[1] else m.grad.T for m in group])  # type: ignore
            momentum.lerp_(gradients, 0.05)
            turned = gradients.lerp(momentum, 0.95)
            turned /= turned.norm(dim=(1, 2), keepdim=True) + 1e-7
            for _ in range(5):  # towards the nearest matrix whose singular values are all one
                square = turned @ turned.mT
                turned = 3.4445 * turned + (-4.775 * square + 2.0315 * square @ square) @ turned
            scale = 0.2 * max(turned.shape[1:]) ** 0.5 * rate  # the length of AdamW's steps
            for matrix, change in zip(group, turned, strict=True):
                matrix.mul_(1 - rate * decay).sub_(change if change.shape == matrix.shape else change.T, alpha=scale)


def losses_of(model: nn.Module, ids: Tensor, mark: int) -> tuple[Tensor, Tensor, float]:
    """The mean loss of the tokens behind `mark`, of all others, and the share of the former that is right."""
    logits, wanted = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    losses, due = F.cross_entropy(logits, wanted, reduction="none"), (ids[:, :-1] == mark).flatten()
    right = (logits[due].argmax(-1) == wanted[due]).float().mean()
    return losses[due].mean(), losses[~due].mean(), float(right)


def train(settings: Settings, log: Any = print) -> tuple[Any, Any, Settings]:
    """The model, its tokenizer, and what its training took: at most `steps`, fewer once it knows enough."""
    torch.manual_seed(settings["seed"])
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_config(config_of(settings, len(tokenizer))).float().train()
    rates = skip_rates(settings)
    skipping(model, rates, Random(settings["seed"]))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    muon, adamw = BatchedMuon(matrices), torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98))
    deadline, stream, began = settings["steps"], documents(settings["tasks"], settings["seed"]), time.perf_counter()
    joined_at = None
    mark = tokenizer.convert_tokens_to_ids("Answer:")
    hits, falling_from, step = 0.0, deadline - deadline // 5, 0
    while step < min(deadline, falling_from + falling_from // 4):
        share = min(1.0, (step + 1) / 50, 1 - max(0, step - falling_from) / (falling_from // 4))
        ids = batch(tokenizer, settings, stream)
        answers, others_loss, right = losses_of(model, ids, mark)
        (answers + OTHER_WEIGHT * others_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(RATES[0] * share)
        adamw.param_groups[0]["lr"] = RATES[1] * share
        adamw.step()
        model.zero_grad(set_to_none=False)
        step += 1
        hits = 0.9 * hits + 0.1 * right
        if hits > ENOUGH and "grown_from" in settings and 1.0 in rates:
            rates[:], hits, joined_at = [0.0] * len(rates), 0.0, step
        elif hits > ENOUGH and falling_from > step:
            falling_from = step
        if step % 100 == 0:
            log(step, f"{hits:.3f}", f"{answers:.3f}", f"{time.perf_counter() - began:.0f} s", flush=True)
    took = {"steps": step, "joined_at": joined_at, "tokens": step * ids.numel()}
    return model.eval(), tokenizer, took | {"seconds": round(time.perf_counter() - began, 1)}


def make(name: str, settings: Settings, work: Path) -> None:
    """Train the model of that name into its folder, unless it is there."""
    if (work / name / "config.json").exists():
        return
    model, tokenizer, took = train(settings)
    for block in model.model.layers:
        del block.forward  # the skips are of training alone
    tokenizer.save_pretrained(work / name)
    model.save_pretrained(work / name)
    row = {"model": name, **settings, "parameters": sum(p.numel() for p in model.parameters()), **took}
    with (HERE / "training.jsonl").open("a") as file:
        file.write(json.dumps({**row, "environment": environment(), "finished": now()}) + "\n")
