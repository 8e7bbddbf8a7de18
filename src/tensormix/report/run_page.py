"""The page of one run beside its dense reference, and the comparison of several runs."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from tensormix.rows import STAGES

from .boundary import model_name
from .choices import choices_table, contenders_table
from .costs import loss_figure, matching_figure, size_figure
from .figure import Column, Table, data, table
from .measures import Record, record, with_costs_of
from .numbers import MISSING, count, plural, short_name
from .page import Page, common_notes, environments_part, facts_part, settings_part
from .read import Run, runs_of
from .rendering import say
from .scaling import operator_figure
from .series import look
from .sites import measures_table, sites_table, storage_table, subjects_table
from .sweep_page import key_figures, savings
from .tables import compared, details_table, measured, measured_data, resources_table
from .tradeoffs import entropy_trends, residual_figure, tradeoff_figure
from .weights import weight_figures

OPTIONAL = ("allocate", "direct", "reparameterise")  # stages that most runs do not have


def own_record(run: Run, name: str | None = None) -> Record:
    """Its method is its name in a comparison, else "mixt" or "mixt + svd"."""
    rows = run.rows("compress")
    blocks = {row["block"] for row in rows} - {None}
    methods = " + ".join(dict.fromkeys(row["method"] for row in rows)) or "dense"
    return record(run, name or run.name, depth=len(blocks), method=name or methods)


def dense_record(run: Run, own: Record) -> Record:
    """The dense reference: its own run, else the dense rows that this run measured."""
    return with_costs_of(record(run.dense, "dense", dense=True, depth=0, method="dense"), [own])


def run_page(run: Run) -> Page:
    """The page of one run, finished or not."""
    item = own_record(run)
    dense, model, done = dense_record(run, item), model_name(run.recipe) or run.name, "evaluate" in run.stages
    saved = savings(dense, item)
    lead = [say("tops", "run_lead", **saved)] if any(saved.values()) else []
    lead += [] if done else [say("tops", "run_banner")]
    page = Page(
        f"{short_name(model)}: {run.name}",
        say("tops", "eyebrow", "run", run.name, model),
        say("tops", "run_headline", model, item.depth, item.accuracy, dense.accuracy, done),
        [*lead, key_figures(dense, item) or Markup()],
    )
    measures = (measures_table(item, dense), say("tops", "terms"), subjects_table(item, dense))
    page.section("measures", "Beside the dense model", *measures)
    quality = (tradeoff_figure(dense, [item]), residual_figure([item]), details_table(dense, [item]))
    page.section("language", "Beside what is saved", *quality)
    page.section("dense", "Inside the dense model", *weight_figures(list(runs_of(run))))
    costs = (operator_figure([run]), storage_table([run]), _resources(dense, [item]))
    page.section("resources", "What is saved", *costs)
    page.section("choices", "What competed", contenders_table(run), choices_table(run))
    page.section("healing", "Matching and recovery", loss_figure([item]), matching_figure(run))
    none = say("parts", "empty", "The compress stage has not finished or replaced nothing.")
    page.section("sites", "Sites", sites_table(run) or none)
    missing = [stage for stage in STAGES if stage not in run.stages and stage not in OPTIONAL]
    notes = say("notes", "run", common_notes([item, dense]), missing, run.dense is not None)
    page.section("notes", "Notes for an honest reading", notes)
    page.about(run, run.recipe, "run", "recipe.yaml")
    return page


def _resources(dense: Record, items: Sequence[Record]) -> Table | Markup:
    return resources_table(dense, items) or say("parts", "empty", "No cell has been profiled yet.")


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Folder names; where two are equal, with their parents' names before them."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{run.folder.resolve().parent.name}/{name}"
        for run, name in zip(runs, names, strict=True)
    ]


def comparison_table(items: Sequence[Record], models: dict[Record, str]) -> Table:
    """One row per run."""
    tokens = max((tokens for item in items for tokens in item.latency), default=0)
    columns = [
        Column("Run", lambda item: item.name),
        Column("Model", models.__getitem__, numeric=False),
        Column("N_B", lambda item: str(item.depth)),
        Column("Parameters", lambda item: count(item.resource("parameters"))),
        Column("MACs", lambda item: count(item.resource("macs_per_token")), "per token"),
        *measured(items),
        Column(
            "Speed", lambda item: compared(item.speedup(tokens)), plural(tokens, "token") if tokens else "dense = 1"
        ),
    ]
    known = data(items, {
        "run": "name", "model": models.__getitem__, "blocks_replaced": "depth",
        "parameters": lambda item: item.resource("parameters"),
        "macs_per_token": lambda item: item.resource("macs_per_token"),
        **measured_data(items), "speedup": lambda item: item.speedup(tokens),
    })  # fmt: skip
    return table("Runs", columns, items, file="runs.csv", data=known)


def comparison_page(runs: Sequence[Run]) -> Page:
    """Several runs in one table, with accuracy against cost."""
    names = unique_names(runs)
    items = [own_record(run, name) for run, name in zip(runs, names, strict=True)]
    models = {item: model_name(run.recipe) or MISSING for item, run in zip(items, runs, strict=True)}
    page = Page("Comparison of runs", Markup("tensormix · comparison"), Markup(f"{len(runs)} runs compared"))
    styles = {item.series: look(i) for i, item in enumerate(items)}
    dense = next((d for d in map(dense_record, runs, items) if d.resources), Record("dense", depth=0, method="dense"))
    page.section("runs", "Runs", comparison_table(items, models), say("tops", "terms"))
    page.section("cost", "Accuracy and cost", size_figure(dense, items, styles), tradeoff_figure(dense, items, styles))
    page.section("geometry", "Inside the models", residual_figure(items, styles), entropy_trends(dense, items, styles))
    page.section("details", "Details", details_table(dense, items))
    page.section("resources", "Resources", operator_figure(runs), storage_table(runs), _resources(dense, items))
    missing = [name for run, name in zip(runs, names, strict=True) if "evaluate" not in run.stages]
    notes = say("notes", "runs", common_notes(items), missing, len(set(models.values())) > 1)
    page.section("notes", "Notes for an honest reading", notes)
    for index, (run, name) in enumerate(zip(runs, names, strict=True), start=1):
        settings = settings_part(run.recipe, f"recipe-{index}.yaml")
        page.section(f"run-{index}", f"Run {name}", facts_part(run, run.recipe), settings, environments_part(run))
    return page
