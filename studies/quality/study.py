"""Measure the rows of the study: compress, recover with the same tokens, perplexity before and after.

    python studies/quality/text.py ../shared/data /tmp/study/text
    python studies/quality/train_midsize.py --data ../shared/data --out /tmp/study/midsize
    python studies/quality/study.py --data ../shared/data --work /tmp/study [--model midsize]

Rows are appended to results.jsonl, each with its settings and its environment; one that is there is not measured again.
A model or a method that is not there yet is passed over, so the same command fills in what is missing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from variants import equal_keep, plan_of

from tensormix.compression import compress
from tensormix.data import calibration_batches, packed_source, separator_of
from tensormix.demo import sweep_file
from tensormix.evaluate import evaluate_choices, exam_prompts, perplexity
from tensormix.methods import Mixt
from tensormix.models import load_model, load_tokenizer
from tensormix.plan import Plan
from tensormix.recover import recover
from tensormix.reparameterise import learn_bases, residual_basis, rotate_residual
from tensormix.settings import Exam, Recover, Source
from tensormix.sites import blocks, find_sites, macs_per_token
from tensormix.storage.files import environment, now

HERE = Path(__file__).parent
LABELS = ("model", "variant", "depth", "steps", "batch_size", "learning_rate", "seed")
CALIBRATION_WINDOWS = 32  # unless the variant says how many
LOCAL_SHARE = 0.25  # of the steps, where blocks are trained alone first
OPTIONS = ("rotate", "hidden", "then_text", "in_steps", "calibration")  # of a variant, told in its rows
TASK_SHARE = 0.25  # of the steps, where the last ones learn from the text


def asked(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The labels of every row that the recipe asks for, in its order."""
    for round_ in settings["rounds"]:
        usual = settings["models"][round_["model"]]["recovery"]
        batch_sizes = round_.get("batch_sizes", [usual["batch_size"]])
        rates = round_.get("learning_rates", [usual["learning_rate"]])
        lists = (round_["depths"], round_["steps"], round_["seeds"], batch_sizes, rates, round_["variants"])
        for depth, steps, seed, batch_size, rate, variant in product(*lists):
            yield dict(zip(LABELS, (round_["model"], variant, depth, steps, batch_size, rate, seed), strict=True))


def shares(model: Any, variant: dict[str, Any], labels: dict[str, Any]) -> list[tuple[str, int]]:
    """Which blocks are compressed, and the steps of recovery that follow; `in_steps`: block by block from the end."""
    depth, steps = labels["depth"], labels["steps"]
    if not variant.get("in_steps"):
        return [(f"last {depth}", steps)]
    last = len(blocks(model)) - 1
    return [(str(last - i), steps // depth + (steps % depth if i == depth - 1 else 0)) for i in range(depth)]


def fit(model: Any, plan: Plan, variant: dict[str, Any], batches: list[torch.Tensor]) -> dict[str, Any]:
    """Compress in place, in the bases that the variant asks for; what a row says about it."""
    facts: dict[str, Any] = {}
    num_blocks, sites = len(blocks(model)), find_sites(model)
    chosen = plan.resolve(sites, num_blocks)
    if variant.get("rotate"):
        compressed = {site.block for site in sites if site.name in chosen}
        rotate_residual(model, residual_basis(model, batches, range(min(compressed), num_blocks)))
    if "bases" in variant:  # learned for the mixtures of this plan
        learned = {name: method for name, method in chosen.items() if isinstance(method, Mixt)}
        facts["bases"] = learn_bases(model, learned, batches, steps=variant["bases"])
    facts["stored"] = sum(row["parameters"] for row in compress(model, plan, batches))
    return facts


class Study:
    """The models, the texts and the rows that are there."""

    def __init__(self, settings: dict[str, Any], data: Path, work: Path, rows: Path) -> None:
        self.settings, self.data, self.work, self.file = settings, data, work, rows
        self.rows = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []

    def path(self, name: str) -> Path:
        path = self.settings["models"][name]["path"]
        if path == "demo":
            return sweep_file().parent / "model"
        return Path(path.replace("DATA", str(self.data)).replace("WORK", str(self.work)))

    def sources(self, name: str) -> tuple[Source, ...]:
        text = self.settings["models"][name]["recovery"].get("text")
        if text is None:
            return (Source(exam=True, seed=11, weight=0.9), Source(facts=True, seed=11, weight=0.1))
        return (Source(file=str(self.work / "text" / f"{text}.jsonl")),)

    def measure(self, labels: dict[str, Any]) -> dict[str, Any] | None:
        """One row; None if the model or the method is not there."""
        about, variant = self.settings["models"][labels["model"]], self.settings["variants"][labels["variant"]]
        path = self.path(labels["model"])
        if not (path / "model.safetensors").exists():
            print("passed over:", labels, f"there is no model in {path}", flush=True)
            return None
        model: Any = load_model(path, dtype="float32")
        tokenizer, branches = load_tokenizer(path), about["branches"]
        try:
            keep = equal_keep(model, f"last {labels['depth']}", branches, variant)
            plans = [(plan_of(variant, where, branches, keep), n) for where, n in shares(model, variant, labels)]
        except (ValidationError, ValueError) as error:
            print("passed over:", labels, error, flush=True)
            return None
        methods = [rule.method.model_dump(mode="json") for rule in plans[0][0].root]
        row = dict(labels) | {"method": methods[0] if len(methods) == 1 else methods, "loss": variant["loss"]}
        row |= {key: variant[key] for key in OPTIONS if key in variant}
        row |= {"dense": self.evaluate(labels["model"], model, tokenizer), "stored": 0}
        row |= {"tokens": 0, "seconds_fit": 0.0, "seconds_recovery": 0.0}
        for number, (plan, steps) in enumerate(plans):
            self.step(row, model, tokenizer, plan, steps, seed=labels["seed"] + 10_000 * number)
        if len(plans) > 1:
            del row["before"]  # of the last block alone: no start of the whole
        row |= {"parameters": sum(p.numel() for p in model.parameters()), "macs_per_token": macs_per_token(model)}
        row["after"] = self.evaluate(labels["model"], model, tokenizer)
        return row | {"environment": environment(), "finished": now()}

    def step(self, row: dict[str, Any], model: Any, tokenizer: Any, plan: Plan, steps: int, seed: int) -> None:
        """Compress what the plan says and recover the whole model, in place; the row gets what that took."""
        about, variant = self.settings["models"][row["model"]], self.settings["variants"][row["variant"]]
        wanted, began = self.recovery(row, about, variant, steps), time.perf_counter()
        num_windows = variant.get("calibration", CALIBRATION_WINDOWS)
        windows = {"window": wanted.window, "num_windows": num_windows, "seed": seed + 1000}
        batches = calibration_batches(tokenizer, wanted.text[0], **windows)
        facts = fit(model, plan, variant, batches)
        row["stored"] += facts.pop("stored")
        row |= facts
        row["seconds_fit"] += time.perf_counter() - began
        row["before"] = self.evaluate(row["model"], model, tokenizer)
        model.to(getattr(torch, about.get("dtype", "float32")))
        began = time.perf_counter()
        name = "_".join(str(row[key]) for key in LABELS).replace(" ", "") + f"_{seed}"
        folders = {"folder": self.work / "checkpoints" / name, "cache": self.work / "teacher"}
        losses = recover(model, tokenizer, wanted, seed=seed, teacher=self.path(row["model"]), **folders)
        model.float()
        row["seconds_recovery"] += time.perf_counter() - began
        row["tokens"] += steps * wanted.batch_size * wanted.window
        row["core_rate"] = wanted.core_rate
        row["last_losses"] = [loss["loss"] for loss in losses if loss["kind"] == "loss"][-5:]

    def recovery(self, row: dict[str, Any], about: dict[str, Any], variant: dict[str, Any], steps: int) -> Recover:
        distill: dict[str, Any] = {"hidden": variant.get("hidden", 0.0)}
        if variant["loss"] == "local_then_kl":
            distill["local_steps"] = max(1, round(LOCAL_SHARE * steps))
        if variant.get("then_text"):
            distill["task_steps"] = max(1, round(TASK_SHARE * steps))
        return Recover(
            text=self.sources(row["model"]),
            steps=steps,
            batch_size=row["batch_size"],
            learning_rate=row["learning_rate"],
            window=about["recovery"]["window"],
            loss_on=about["recovery"].get("loss_on", "all"),
            loss=variant["loss"],
            core_rate=variant.get("core_rate", "same"),
            distill=distill,
            save_every=max(100, steps // 4),
        )

    def evaluate(self, name: str, model: Any, tokenizer: Any) -> dict[str, float]:
        about, found = self.settings["models"][name], {}
        for text in ("in_domain", "held_out") if "evaluation" in about else ():
            asked = about["evaluation"]
            source = Source(file=str(self.work / "text" / f"{asked[text]}.jsonl"))
            ids = packed_source(tokenizer, source)[: asked["num_tokens"]]
            found[text] = perplexity(
                model,
                ids,
                window=asked["window"],
                stride=asked["window"],
                text=text,
                bos_id=separator_of(tokenizer),
                batch_size=16,
            )["value"]
        if "exam" in about:
            prompts = exam_prompts(Exam(num_questions=about["exam"], seed=1))
            found["exam"] = evaluate_choices(model, tokenizer, prompts, batch_size=50)[0]["value"]
        return found

    def run(self, only: str | None) -> None:
        there = {tuple(row[key] for key in LABELS) for row in self.rows}
        for labels in asked(self.settings):
            if only not in (None, labels["model"]) or tuple(labels.values()) in there:
                continue
            row = self.measure(labels)
            if row is None:
                continue
            there.add(tuple(labels.values()))
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            told = (*LABELS, "stored", "before", "after", "seconds_recovery")
            print({key: row[key] for key in told if key in row}, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the shared data: models/, text/, instruct/")
    parser.add_argument("--work", type=Path, required=True, help="folder with text/ and midsize/; checkpoints go there")
    parser.add_argument("--model", help="only the rows of this model")
    parser.add_argument("--settings", type=Path, default=HERE / "study.yaml")
    parser.add_argument("--rows", type=Path, default=HERE / "results.jsonl")
    arguments = parser.parse_args()
    recipe = yaml.safe_load(arguments.settings.read_text())
    Study(recipe, arguments.data, arguments.work, arguments.rows).run(arguments.model)
