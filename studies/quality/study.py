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
import math
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from tensormix.data import Mixture, packed_source, separator_of
from tensormix.demo import sweep_file
from tensormix.evaluate import evaluate_choices, perplexity
from tensormix.examine import exam_prompts
from tensormix.methods.base import LinearMethod
from tensormix.models import load_model, load_tokenizer
from tensormix.operators import StructuredLinear
from tensormix.plan import Plan
from tensormix.recover import recover
from tensormix.reparameterise import learn_bases, residual_basis, rotate_residual
from tensormix.settings import Exam, Recover, Source
from tensormix.sites import blocks, find_sites, macs_per_token
from tensormix.storage.files import environment, now
from tensormix.walk import compress
from tensormix.walk.joint import groups_of

HERE = Path(__file__).parent
LABELS = ("model", "variant", "depth", "steps", "seed")
CALIBRATION_WINDOWS = 32
LOCAL_SHARE = 0.25  # of the steps, where blocks are trained alone first


def stored(model: Any, plan: Plan) -> int:
    """Numbers that the plan's operators would store."""
    sites = {site.name: site for site in find_sites(model)}
    chosen = plan.resolve(list(sites.values()), len(blocks(model)))
    operators: dict[str, StructuredLinear] = {}
    for group in groups_of(model, sites, chosen).values():
        operators |= group.empty()
    for name, method in chosen.items():
        if isinstance(method, LinearMethod):
            operators[name] = method.empty(sites[name].in_features, sites[name].out_features)
    return sum(operator.num_params for operator in operators.values())


def plan_of(method: dict[str, Any], depth: int, branches: int) -> Plan:
    if method["name"] == "mixt" or method.get("num_branches") == "BRANCHES":
        method = method | {"num_branches": branches}
    return Plan.model_validate([{"blocks": f"last {depth}", "method": method}])


def equal_keep(model: Any, depth: int, branches: int, method: dict[str, Any]) -> float:
    """The `keep` at which the method stores the number nearest to what MixT stores in the same blocks."""
    wanted = stored(model, plan_of({"name": "mixt"}, depth, branches))

    def miss(keep: float) -> float:
        try:
            return abs(stored(model, plan_of(method | {"keep": keep}, depth, branches)) - wanted)
        except ValueError:  # nothing is left of some layer
            return math.inf

    return min((step / 1000 for step in range(10, 400)), key=miss)


def fit(model: Any, plan: Plan, variant: dict[str, Any], depth: int, batches: list[torch.Tensor]) -> dict[str, Any]:
    """Compress in place, in the bases that the variant asks for; what a row says about it."""
    facts: dict[str, Any] = {}
    num_blocks = len(blocks(model))
    if variant.get("rotate"):
        rotate_residual(model, residual_basis(model, batches, range(num_blocks - depth, num_blocks)))
    if "bases" in variant:  # learned for the operators of this plan
        chosen = plan.resolve(find_sites(model), num_blocks).items()
        learned = {name: method for name, method in chosen if isinstance(method, LinearMethod)}
        facts["bases"] = learn_bases(model, learned, batches, steps=variant["bases"])
    facts["stored"] = sum(row["parameters"] for row in compress(model, plan, batches))
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    return facts | {"macs_per_token": macs_per_token(model)}


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
            return None
        model: Any = load_model(path, dtype="float32")
        method = dict(variant["method"])
        if method.get("keep") == "KEEP":
            method["keep"] = equal_keep(model, labels["depth"], about["branches"], method)
        try:
            plan = plan_of(method, labels["depth"], about["branches"])
        except (ValidationError, ValueError):
            return None
        tokenizer, began = load_tokenizer(path), time.perf_counter()
        row = dict(labels) | {"method": plan.root[0].method.model_dump(mode="json"), "loss": variant["loss"]}
        row["dense"] = self.evaluate(labels["model"], model, tokenizer)
        sources, seed = self.sources(labels["model"]), labels["seed"]
        window = about["recovery"]["window"]
        calibration = Mixture(tokenizer, sources[:1], window=window, num_windows=CALIBRATION_WINDOWS, seed=seed + 1000)
        batches = [calibration[i]["input_ids"][None] for i in range(CALIBRATION_WINDOWS)]
        row |= fit(model, plan, variant, labels["depth"], batches)
        row["before"] = self.evaluate(labels["model"], model, tokenizer)
        wanted = self.recovery(about, variant, sources, labels["steps"])
        row |= {
            "tokens": labels["steps"] * wanted.batch_size * wanted.window,
            "seconds_fit": time.perf_counter() - began,
        }
        row["learning_rate"], row["core_rate"] = wanted.learning_rate, wanted.core_rate
        model.to(getattr(torch, about.get("dtype", "float32")))
        began = time.perf_counter()
        name = "_".join(str(labels[key]) for key in LABELS).replace(" ", "")
        folders = {"folder": self.work / "checkpoints" / name, "cache": self.work / "teacher"}
        losses = recover(model, tokenizer, wanted, seed=seed, teacher=path, **folders)
        row["seconds_recovery"] = time.perf_counter() - began
        row["last_losses"] = [loss["loss"] for loss in losses if loss["kind"] == "loss"][-5:]
        row["after"] = self.evaluate(labels["model"], model.float(), tokenizer)
        return row | {"environment": environment(), "finished": now()}

    def recovery(self, about: dict[str, Any], variant: dict[str, Any], sources: Any, steps: int) -> Recover:
        given = {key: value for key, value in about["recovery"].items() if key != "text"}
        distill = {"local_steps": max(1, round(LOCAL_SHARE * steps))} if variant["loss"] == "local_then_kl" else {}
        return Recover(
            text=sources,
            steps=steps,
            loss=variant["loss"],
            core_rate=variant.get("core_rate", "same"),
            distill=distill,
            save_every=max(100, steps // 4),
            **given,
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
        for round_ in self.settings["rounds"]:
            if only not in (None, round_["model"]):
                continue
            for depth, steps, seed, variant in product(
                *(round_[key] for key in ("depths", "steps", "seeds", "variants"))
            ):
                labels = dict(zip(LABELS, (round_["model"], variant, depth, steps, seed), strict=True))
                if tuple(labels.values()) in there:
                    continue
                row = self.measure(labels)
                if row is None:
                    print("not there yet:", labels, flush=True)
                    continue
                with self.file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print({key: row[key] for key in (*LABELS, "stored", "before", "after", "seconds_recovery")}, flush=True)


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
