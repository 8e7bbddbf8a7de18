"""Does a short recovery help a compressed model? One row for each way to recover, one thing changed at a time.

    tensormix run studies/recovery/narrow.yaml --out /tmp/recovery/narrow
    python studies/recovery/study.py --start /tmp/recovery/narrow/compressed --data ../shared/data

Every variant begins with the same compressed checkpoint and sees as many tokens. The plain loop stands beside the
product: windows of 512 tokens, AdamW, two warm-up steps and a cosine, gradients clipped at 1, all parameters. Rows are
appended to results.jsonl; one that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor

from tensormix.data import Mixture, packed_source
from tensormix.models import load_model, load_tokenizer
from tensormix.recover import recover
from tensormix.recover.losses import divergence
from tensormix.settings import Recover, Source
from tensormix.storage.files import environment, now

HERE = Path(__file__).parent
TEXTS = {"wikitext2": ("text/wikitext2_test.raw", {}), "c4": ("text/c4_300.jsonl", {"num_documents": 40})}
TOKENS, LONG = 6144, 1024  # judged, and in one window


def sources(data: Path) -> list[Source]:
    files = ("prose_openstax_biology", "instruct_dolly", "code_stdlib")
    chats = {"instruct_dolly": "messages"}
    return [Source(file=str(data / "recovery" / f"{name}.jsonl"), chat=chats.get(name)) for name in files]


@torch.no_grad()
def judged(model: Any, tokenizer: Any, data: Path) -> dict[str, Any]:
    """Perplexity of both texts, and the loss of each of their windows: one that fails alone moves the mean."""
    found: dict[str, Any] = {}
    for name, (file, options) in TEXTS.items():
        ids = packed_source(tokenizer, Source(file=str(data / file), **options))[:TOKENS].view(-1, LONG)
        losses = [float(model(row[None], labels=row[None], use_cache=False).loss) for row in ids]
        found |= {name: math.exp(sum(losses) / len(losses)), f"{name}_windows": [round(loss, 3) for loss in losses]}
    return found


def random_windows(tokenizer: Any, data: Path, window: int, count: int, seed: int, marks: bool = False) -> list[Tensor]:
    """Windows that begin anywhere in one of the sources, drawn with the same chance; without `marks` the BOS token,
    which stands before documents and, in this chat template, before every turn, is left out."""
    random, rows = Random(seed), []
    texts = [packed_source(tokenizer, source) for source in sources(data)]
    texts = texts if marks else [ids[ids != tokenizer.bos_token_id] for ids in texts]
    for _ in range(count):
        ids = random.choice(texts)
        start = random.randrange(len(ids) - window)
        rows.append(ids[start : start + window])
    return rows


def one_event(student: Tensor, teacher: Tensor, top_k: int) -> Tensor:  # (B, T, V) each -> (B, T)
    """KL over the most probable tokens and all others together, as one event: what recovery learned from before."""
    values, tokens = teacher.log_softmax(-1).topk(top_k)
    total = student.logsumexp(-1)
    exact = (values.exp() * (values - student.gather(-1, tokens) + total[..., None])).sum(-1)
    tail = (1 - values.exp().sum(-1)).clamp(min=0)
    others = student.scatter(-1, tokens, float("-inf")).logsumexp(-1) - total
    return exact + torch.special.xlogy(tail, tail) - tail * others


def plain_loop(
    model: Any, teacher: Any, windows: list[Tensor], asked: dict[str, Any], judge: Callable[[], dict[str, float]]
) -> tuple[list[float], dict[str, float]]:
    """The loop that needs nothing of the package but, where asked for, its loss; losses, and `judge` halfway."""
    halfway: dict[str, float] = {}
    size, steps, rate = asked["batch_size"], asked["steps"], asked["learning_rate"]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.999))
    warmup, losses = asked.get("warmup", 2), []
    for step in range(steps):
        at = step - asked.get("late", 0)  # the Trainer's first step has a rate of 0
        done = (at - warmup) / max(1, steps - warmup)
        factor = (at + 1) / warmup if at < warmup else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        ids = torch.stack(windows[size * step : size * (step + 1)])
        with torch.no_grad():
            wanted = teacher(ids, use_cache=False).logits[:, :-1]
        logits, top_k = model(ids, use_cache=False).logits[:, :-1], asked.get("top_k")
        loss = (divergence(logits, wanted) if top_k is None else one_event(logits, wanted, top_k)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(asked["variant"], step + 1, round(losses[-1], 4), flush=True)
        if step + 1 == steps // 2:
            model.eval()
            halfway.update(judge())
            model.train()
    model.eval()
    return losses, halfway


def with_product(model: Any, tokenizer: Any, asked: dict[str, Any], data: Path) -> list[dict[str, Any]]:
    own = {key: asked[key] for key in ("steps", "batch_size", "learning_rate", "window")}
    settings = Recover(text=tuple(sources(data)), loss="kl", **own, **asked.get("settings", {}))
    with TemporaryDirectory() as folder:
        return recover(
            model, tokenizer, settings, folder=Path(folder) / "run", seed=asked["seed"], teacher=asked["model"]
        )


def measure(asked: dict[str, Any], data: Path) -> dict[str, Any]:
    """One row."""
    model, tokenizer = load_model(asked["start"], dtype="float32"), load_tokenizer(asked["model"])
    began, before, halfway = time.perf_counter(), judged(model, tokenizer, data), None
    print(asked["variant"], "before", before, flush=True)
    if asked["loop"] == "product":
        rows = with_product(model, tokenizer, asked, data)
        losses = [row["loss"] for row in rows if row["kind"] == "loss"]
        print([row for row in rows if row["kind"] != "loss"], flush=True)
    else:
        count = asked["steps"] * asked["batch_size"]
        if asked["windows"] == "product":
            mixture = Mixture(tokenizer, sources(data), window=asked["window"], num_windows=count, seed=asked["seed"])
            windows = [mixture[number]["input_ids"] for number in range(count)]
        else:
            marks = asked["windows"] == "random with marks"
            windows = random_windows(tokenizer, data, asked["window"], count, asked["seed"], marks)
        teacher = load_model(asked["model"], dtype="float32")
        losses, halfway = plain_loop(model, teacher, windows, asked, lambda: judged(model, tokenizer, data))
    after = judged(model, tokenizer, data)
    if asked.get("save"):
        model.save_pretrained(asked["save"])
    print(asked["variant"], "after", after, flush=True)
    facts = {
        "before": before,
        "halfway": halfway,
        "after": after,
        "losses": losses,
        "seconds": round(time.perf_counter() - began, 1),
    }
    return {**asked, **facts, "environment": environment(), "finished": now()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--start", required=True, help="folder of the compressed model")
    parser.add_argument("--save", help="folder for the recovered model of the last variant")
    parser.add_argument("--only", nargs="*", help="names of variants")
    options = parser.parse_args()
    settings = yaml.safe_load((HERE / "study.yaml").read_text())
    file = HERE / "results.jsonl"
    there = [json.loads(line)["variant"] for line in file.read_text().splitlines()] if file.exists() else []
    for variant in settings["variants"]:
        if variant["variant"] in there or (options.only and variant["variant"] not in options.only):
            continue
        start = options.model if variant.get("dense") else options.start
        asked = {**settings["usual"], **variant, "model": options.model, "start": start, "save": options.save}
        row = measure(asked, options.data)
        with file.open("a") as rows:
            rows.write(
                json.dumps({**row, "model": Path(options.model).name, "start": Path(start).name, "save": None}) + "\n"
            )


if __name__ == "__main__":
    main()
