"""The cases of tools/same.py: what the command line is asked, as plain data; paths are relative to the models.

A case is a verb of the command line with its settings. A name is a group and a case: methods/mixt_aware.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from same_models import DENSE, EXPERTS

Settings = dict[str, Any]


class Case(NamedTuple):
    verb: str
    settings: Settings
    options: tuple[str, ...] = ()
    refused: bool = False  # it shall end with a sentence, which is what is compared


def method(name: str, /, blocks: str | int = "last 2", sites: Any = None, **settings: Any) -> Settings:
    """One rule of a plan."""
    rule = {"blocks": blocks, "method": {"name": name, **settings}}
    return rule if sites is None else {**rule, "sites": sites}


PROSE, OTHER, FACTS, QUESTIONS = {"file": "prose.txt"}, {"file": "other.txt"}, {"facts": True}, {"exam": True}
MIXT, LOW = method("mixt", num_branches=3), method("svd_llm", keep=0.5)
AWARE = method("mixt", num_branches=2, init="aware", max_steps=40)
LOSS = {"text": OTHER, "window": 32, "stride": 32, "num_tokens": 128}
EXAM = {"num_questions": 16, "shots": 0}
RECOVER = {"steps": 6, "batch_size": 2, "window": 32, "learning_rate": 0.002, "text": [PROSE]}
RECIPE: Settings = {
    "model": "stories",
    "calibration": {"text": PROSE, "num_windows": 4, "window": 48},
    "evaluate": {"exam": None, "perplexity": [LOSS], "batch_size": 4},
    "diagnose": None,
    "profile": None,
}
ASKED = {"exam": EXAM, "perplexity": [LOSS], "batch_size": 4}
SHORT = {"text": PROSE, "num_windows": 2, "window": 32}

METHODS: dict[str, Settings] = {
    "mixt": MIXT,
    "mixt_power": method("mixt", num_branches=2, bond=3, padding="power"),
    "mixt_zero": method("mixt", num_branches=3, init="zero"),
    "mixt_random": method("mixt", num_branches=3, init="random", seed=3),
    "mixt_aware": AWARE,
    "mixt_aware_float64": method("mixt", num_branches=3, init="aware", precision="float64", ridge=0.01, max_steps=40),
    "mixt_low_rank": method("mixt_low_rank", keep=0.5, num_branches=3, rounds=6),
    "mixt_sparse": method("mixt_sparse", keep=0.5, num_branches=3, rounds=6),
    "mixt_chain": method("mixt_chain", num_branches=2, steps=20),
    "mixt_rotated": method("mixt_rotated", num_branches=2, outer=4, steps=20),
    "monarch": method("monarch", keep=0.5, steps=20),
    "svd": method("svd", keep=0.5),
    "svd_llm": LOW,
    "svd_llm_update": method("svd_llm", keep=0.4, update=True, ridge=0.01),
    "coala": method("coala", keep=0.5),
    "coala_mu": method("coala", keep=0.5, mu=0.1),
    "laser": method("laser", keep_rank=0.3),
    "hassle_free": method("hassle_free", keep=0.5, low_rank_share=0.3, steps=8),
    "hassle_free_pattern": method("hassle_free", rank=2, pattern="2:4", sparse="sparsegpt", steps=8),
    "hassle_free_growth": method("hassle_free", rank=1, pattern="3:8", rho_growth=0.1, steps=8),
    "dobi_svd": method("dobi_svd", keep=0.5),
    "dobi_svd_rank": method("dobi_svd", rank=5, pca="incremental"),
    "dobi_svd_remapped": method("dobi_svd", keep=0.5, storage="remapped"),
    "rtn": method("rtn", bits=4, group=16),
    "rtn_channel": method("rtn", bits=3, granularity="channel", symmetric=False),
    "rtn_tensor": method("rtn", bits=8, granularity="tensor"),
    "rtn_of_svd_llm": method("rtn", bits=8, group=16, of={"name": "svd_llm", "keep": 0.5}),
    "rtn_of_mixt": method("rtn", bits=2, group=16, of={"name": "mixt", "num_branches": 2}),
    "zero": method("zero", sites=["gate", "up"]),
    "mean_output": method("mean_output"),
    "sola": method("sola", keep=0.6, granularity=4),
    "sola_ranks": method("sola", ranks={"q": 5, "o": 6, "gate": 4, "up": 5, "down": 7}, ridge=0.01),
    "flat_llm": method("flat_llm", keep=0.6),
    "flat_llm_some": method("flat_llm", keep=0.7, sites=["v", "o", "gate", "up", "down"]),
    "narrow": method("narrow", keep=0.4),
    "narrow_width": method("narrow", keep=0.4, width=0.6),
    "drop_named": method("drop_blocks", blocks=2),
    "drop_angular": method("drop_blocks", blocks="all", choose="angular", count=2),
    "drop_angular_all": method("drop_blocks", blocks="1-3", choose="angular", count=1, tokens="all"),
    "drop_influence": method("drop_blocks", blocks="all", choose="influence", count=2),
    "streamline": method("streamline", blocks="all", count=2, steps=8),
    "streamline_mlp": method("streamline", blocks="all", count=2, steps=8, replacement="mlp", width=16),
    "slice_gpt": method("slice_gpt", blocks="all", keep_channels=0.75),
}
BUDGETS: dict[str, tuple[Settings | list[Settings], Settings]] = {
    "uniform": (method("svd_llm"), {"keep": 0.5}),
    "uniform_mixt": (method("mixt"), {"keep": 0.8, "of": "macs"}),
    "uniform_model": (method("svd", blocks="all"), {"keep": 0.7, "over": "model"}),
    "uniform_sola": (method("sola", granularity=4), {"keep": 0.6}),
    "uniform_flat_llm": (method("flat_llm"), {"keep": 0.6}),
    "uniform_narrow": (method("narrow"), {"keep": 0.5}),
    "uniform_remapped": (method("dobi_svd", storage="remapped"), {"keep": 0.5}),
    "spectrum": (method("svd_llm"), {"keep": 0.5, "by": "spectrum"}),
    "spectrum_bytes": (method("svd"), {"keep": 0.6, "by": "spectrum", "of": "bytes_per_token"}),
    "spectrum_laser": (method("laser"), {"keep": 0.6, "by": "spectrum", "of": "parameters"}),
    "greedy": (method("hassle_free", low_rank_share=0.3, steps=4), {"keep": 0.5, "by": "greedy", "levels": 3}),
    "greedy_bonds": (method("mixt", bonds=[2, 4]), {"keep": 0.4, "by": "greedy"}),
    "greedy_rtn": (method("rtn", group=16), {"keep": 0.2, "by": "greedy"}),
    "greedy_aware": (method("mixt", init="aware", max_steps=20), {"keep": 0.5, "by": "greedy"}),
    "greedy_of": (
        method("rtn", bits=8, group=16, of={"name": "svd_llm"}),
        {"keep": 0.3, "by": "greedy", "levels": 4},
    ),
    "greedy_several": (
        [method("coala", sites=["q", "k", "v", "o"]), method("rtn", group=16)],
        {"keep": 0.4, "by": "greedy", "levels": 4},
    ),
    "sensitivity_kl": (method("svd"), {"keep": 0.5, "by": "sensitivity"}),
    "sensitivity_loss": (method("zero"), {"keep": 0.5, "by": "sensitivity", "measure": "loss"}),
    "sensitivity_angle": (method("mean_output"), {"keep": 0.5, "by": "sensitivity", "measure": "angle"}),
    "sensitivity_blocks": (method("drop_blocks", blocks="all"), {"keep": 0.5, "by": "sensitivity"}),
    "learned": (method("dobi_svd"), {"keep": 0.5, "by": "learned", "steps": 6}),
}
RECOVERIES: dict[str, Settings] = {
    "lm": {"text": [PROSE, {**FACTS, "weight": 0.5}], "warmup": 0.2, "weight_decay": 0.01, "save_every": 3},
    "answers": {
        "text": [QUESTIONS, {"file": "chat.jsonl", "field": "question+answer"}],
        "loss_on": "answers",
        "window": 640,
    },
    "chat": {
        "text": [{"file": "chat.jsonl", "chat": {"user": "question", "assistant": "answer"}}],
        "loss_on": "answers",
        "recompute": True,
    },
    "mixture": {"text": "mixture.yaml"},
    "fan_in": {"core_rate": "fan_in", "parameters": "compressed"},
    "kl": {"loss": "kl", "distill": {"top_k": 8, "task_steps": 2}},
    "kl_hidden": {"loss": "kl", "distill": {"hidden": 0.5, "cache": "../kept"}},
    "kl_teacher": {"loss": "kl", "distill": {"teacher": "llama"}},
    "local_then_kl": {"loss": "local_then_kl", "distill": {"local_steps": 3}},
    "local_dense": {"loss": "local_then_kl", "distill": {"local_steps": 3, "local_inputs": "dense"}},
    "lora": {"parameters": "lora", "lora": {"rank": 2, "alpha": 4}},
    "early_stop": {"save_every": 2, "early_stop": {"threshold": 0.9, "num_questions": 8}, "text": [QUESTIONS]},
}
DIAGNOSTICS = "residual_stream spectra restoration super_weights drop_sensitivity compress_sensitivity spectral_gap"
FAMILY_PLAN = [method("mixt", blocks=0, num_branches=3), method("svd_llm", blocks=1, keep=0.5)]
JOINT_PLAN = [
    method("flat_llm", blocks=1, keep=0.7),
    method("narrow", blocks=2, keep=0.4, width=0.6),
    method("sola", blocks=3, ranks={"q": 5, "o": 6, "gate": 4, "up": 5, "down": 7}),
]
JOINT_FAMILIES = ("llama", "qwen3", "phi3", "opt", "gpt_neox", "gemma2", "mistral")


def run(plan: Settings | list[Settings], *options: str, **changes: Any) -> Case:
    return Case("run", {**RECIPE, "plan": plan if isinstance(plan, list) else [plan], **changes}, options)


def _families() -> Iterator[tuple[str, Case]]:
    for family in [*DENSE, *EXPERTS]:
        more = [method("coala", blocks=2, keep=0.6), method("drop_blocks", blocks=3)]
        yield f"families/{family}", run(FAMILY_PLAN + more, model=family, calibration=SHORT)
    for family in JOINT_FAMILIES:
        yield f"joint/{family}", run(JOINT_PLAN, model=family, calibration=SHORT)
    for name in ("fp8", "mxfp4", "sharded"):
        yield f"stored/{name}", run(FAMILY_PLAN, model=name, calibration=SHORT, dtype="auto")


def _streams() -> Iterator[tuple[str, Case]]:
    settings: Settings = RECIPE["calibration"]
    yield "streams/workers", run(MIXT, "--workers", "2", "--threads", "1")
    yield "streams/spill", run([AWARE, LOW], calibration={**settings, "spill": True})
    yield "streams/dense", run(LOW, calibration={**settings, "inputs": "dense"})
    yield "streams/float32", run(LOW, calibration={**settings, "precision": "float32", "text": QUESTIONS})
    yield "streams/bfloat16", run([method("svd", blocks=0, keep=0.5), AWARE], dtype="bfloat16")
    yield "streams/float64", run([method("mixt_low_rank", blocks=0, keep=0.5, num_branches=3), LOW], dtype="float64")


def _decided() -> Iterator[tuple[str, Case]]:
    for name, (plan, budget) in BUDGETS.items():
        yield f"budgets/{name}", run(plan, budget=budget)
    laser = method("laser", sites=["up", "down"])
    yield "search/exam", run(laser, search={"keep_rank": [0.5, 0.1]}, evaluate=ASKED)
    yield "search/text", run(laser, search={"keep_rank": [0.5, 0.1]})
    yield "bases/aware", run(AWARE, reparameterise={"steps": 6})
    yield "bases/recovered", run(LOW, reparameterise={"steps": 3}, recover=RECOVER)


def _recoveries() -> Iterator[tuple[str, Case]]:
    for name, changes in RECOVERIES.items():
        yield f"recover/{name}", run(MIXT, recover={**RECOVER, **changes})
    yield "recover/lora_low_rank", run(LOW, recover={**RECOVER, **RECOVERIES["lora"], "loss": "kl"})
    yield "recover/dense", run([], recover=RECOVER, profile={"tokens": [1], "repeats": 1})


def _measured() -> Iterator[tuple[str, Case]]:
    seen = {"num_prompts": 8, "run": DIAGNOSTICS.split(), "text": OTHER, "num_windows": 2, "window": 32}
    direct = {**ASKED, "kl": True, "direct": True, "perplexity": [LOSS, {**LOSS, "text": FACTS, "bos": False}]}
    sizes = {"tokens": [1, 8], "repeats": 1}
    yield "measured/all", run(LOW, evaluate=direct, recover=RECOVER, diagnose=seen, profile=sizes)
    yield "measured/experts", run(LOW, model="mixtral", calibration=SHORT, diagnose=seen, profile=sizes)
    own = {**ASKED, "exam": {"file": "exam.jsonl", "num_questions": 12}}
    yield "measured/own_exam", run(MIXT, evaluate=own, diagnose={"num_prompts": 8})
    asked = [
        {"name": "arc_challenge", "file": "bench.jsonl", "num_questions": 10},
        {"name": "mmlu", "file": "mmlu.jsonl", "examples": "mmlu.jsonl", "shots": 1, "num_questions": 10},
    ]
    yield (
        "measured/benchmarks",
        run(MIXT, evaluate={**RECIPE["evaluate"], "benchmarks": asked}, diagnose={"num_prompts": 6}),
    )


def _many() -> Iterator[tuple[str, Case]]:
    recipe = {**RECIPE, "evaluate": ASKED, "diagnose": {"num_prompts": 4}}
    recovered = {**recipe, "recover": {**RECOVER, "steps": 3, "loss": "kl"}, "profile": {"tokens": [1], "repeats": 1}}
    branches = {"num_branches": [2], "depths": [1, 2]}
    ends = {"last": {"depths": "all"}, "first": {"depths": [1]}}
    wide = {**branches, "directions": ends, "baselines": {"depths": [1]}, "family": ["smaller", "llama"]}
    yield "sweeps/scan", Case("sweep", {"recipe": recovered, **wide})
    yield "sweeps/warm", Case("sweep", {"recipe": recovered, **branches, "warm_start": True})
    answers = {**RECOVER, **RECOVERIES["answers"], "text": [QUESTIONS], "window": 160, "steps": 4}
    embedded = {**recipe, "model": "embedded", "evaluate": {**ASKED, "exam": {"num_questions": 24}}}
    yield "sweeps/bisect", Case("sweep", {"recipe": embedded, "search": "bisect"})
    yield "sweeps/embedded", Case("sweep", {"recipe": {**embedded, "recover": answers}, "depths": [3, 6]})
    predicted = {"recipe": {**recovered, "diagnose": None}, **branches}
    yield "sweeps/predicted", Case("predict", predicted, ("--json",))
    yield "sweeps/predicted_table", Case("predict", predicted, ("--direction", "first"))
    contenders = {"mixt": {"method": {"name": "mixt"}}, "low": {"method": {"name": "svd_llm"}, "by": "spectrum"}}
    yield "compared/methods", Case("compare", {"recipe": RECIPE, "methods": contenders, "budgets": [0.5, 0.02]})


def _told() -> Iterator[tuple[str, Case]]:
    plan = [method("mixt", blocks=0, num_branches=2), method("rtn", blocks=1, bits=4), method("drop_blocks", blocks=2)]
    for name in ("llama", "gpt2", "qwen3_moe"):
        yield f"told/check_{name}", Case("check", {**RECIPE, "model": name, "plan": plan}, ("--json",))
    yield (
        "told/check_budget",
        Case("check", {**RECIPE, "plan": [method("svd")], "budget": {"keep": 0.5}, "evaluate": ASKED}, ("--json",)),
    )
    for what in ("methods", "operators", "statistics", "diagnostics", "stages", "subjects"):
        yield f"told/{what}", Case("list", {}, (what, "--json"))


def _refused() -> Iterator[tuple[str, Case]]:
    wrong: dict[str, Settings] = {
        "key": {"plans": []},
        "method": {"plan": [method("svdd", keep=0.5)]},
        "setting": {"plan": [method("svd", kep=0.5)]},
        "type": {"plan": [method("svd", keep="half")]},
        "blocks": {"plan": [method("svd", blocks="lst 2", keep=0.5)]},
        "depth": {"plan": [method("svd", blocks="last 9", keep=0.5)]},
        "role": {"plan": [method("svd", keep=0.5, sites=["querry"])]},
        "fused": {"model": "phi3", "plan": [method("svd", keep=0.5, sites=["q"])]},
        "size": {"plan": [method("svd", keep=0.001)]},
        "calibration": {"plan": [LOW], "calibration": None},
        "budget": {"plan": [method("mixt")], "budget": {"keep": 0.01}},
        "twice": {"plan": [method("svd", keep=0.5)], "budget": {"keep": 0.5}},
        "nothing": {"plan": [method("svd", keep=0.5, sites="no.such.*")]},
        "model": {"model": "/no/such/folder"},
    }
    for name, changes in wrong.items():
        yield f"refused/{name}", Case("check", {**RECIPE, **changes}, refused=True)
    yield (
        "refused/sliced",
        run(method("slice_gpt", blocks="all", keep_channels=0.5), model="opt")._replace(refused=True),
    )
    yield "refused/joint", run(method("sola", keep=0.6, sites=["v", "gate"]))._replace(refused=True)
    yield "refused/listed", Case("list", {}, ("method",), refused=True)


CASES: dict[str, Case] = {
    **{f"methods/{name}": run(rule) for name, rule in METHODS.items()},
    **dict(_families()),
    **dict(_streams()),
    **dict(_decided()),
    **dict(_recoveries()),
    **dict(_measured()),
    **dict(_many()),
    **dict(_told()),
    **dict(_refused()),
}
QUICK = (
    "methods/mixt_aware", "methods/svd_llm_update", "methods/rtn_of_mixt", "methods/narrow_width",
    "methods/streamline", "methods/slice_gpt", "methods/hassle_free", "families/llama", "families/gpt_oss",
    "joint/phi3", "stored/fp8", "streams/bfloat16", "budgets/spectrum", "budgets/sensitivity_kl", "search/text",
    "bases/aware", "recover/kl_hidden", "recover/lora_low_rank", "measured/all", "told/methods",
    "memory/llama", "memory/qwen3_moe", "loading/llama",
)  # fmt: skip
