"""The page of one run beside its dense reference, and the comparison of several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .accounts import details_table, storage_table
from .costs import loss_figure, matching_figure, size_figure
from .figure import ROLE_LOOKS, csv_text, download
from .measures import Record, model_name, record
from .numbers import MISSING, change, count, fixed, nb, percent, plural, short, short_name, text
from .page import Page, common_notes, environments_part, facts_part, listed, reproduce_part, settings_part
from .read import STAGES, Run, runs_of
from .scaling import operator_figure
from .sweep_page import key_figures, saved_words
from .tables import interval, resources_table, sites_table, subjects_table, table
from .tradeoffs import entropy_trends, residual_figure, tradeoff_figure
from .weights import weight_figures


def replaced_blocks(run: Run) -> int:
    return len({row["block"] for row in run.rows("compress") if row.get("block") is not None})


def methods_of(run: Run) -> str:
    """The method names of a run as a series label: "mixt", or "mixt + svd"."""
    return " + ".join(dict.fromkeys(str(row["method"]) for row in run.rows("compress") if row.get("method"))) or "dense"


def dense_record(run: Run, own: Record) -> Record:
    """The dense reference: its own run, else the dense rows that this run measured."""
    dense = record(run.dense, "dense", dense=True, depth=0, method="dense")
    if dense.resources or not own.dense_resources:
        return dense
    return Record(**{**dense.__dict__, "resources": own.dense_resources, "latency": own.dense_latency})


def own_record(run: Run, name: str | None = None) -> Record:
    return record(run, name or run.name, depth=replaced_blocks(run), method=name or methods_of(run))


def measures_table(item: Record, dense: Record) -> str:
    """One line per measure: dense, this run, change."""
    columns = [("Measure", ""), ("Dense", "n"), ("This run", "n"), ("Change", "n")]
    lines = [
        (
            "Exam accuracy",
            interval(dense.accuracy, dense.low, dense.high),
            interval(item.accuracy, item.low, item.high),
            _points(item.accuracy, dense.accuracy),
        ),
        _line("Output entropy (OE)", dense.output_entropy, item.output_entropy, fixed),
        _line("Prediction entropy (PE)", dense.prediction_entropy, item.prediction_entropy, fixed),
    ]
    for name in dict.fromkeys([*dense.perplexity, *item.perplexity]):
        lines.append(_line(f"Perplexity: {text(name)}", dense.perplexity.get(name), item.perplexity.get(name), short))
    for region, name in (("all", "all layer pairs"), ("output", "pairs near the output")):
        if region in item.drift:
            lines.append((f"Geometry drift, {name}", "0 by definition", fixed(item.drift[region], 4), MISSING))
    return table("Measures", columns, [("", line) for line in lines])


def _line(
    name: str, dense: float | None, own: float | None, show: Callable[[float | None], str]
) -> tuple[str, str, str, str]:
    return (name, show(dense), show(own), change(own, dense))


def _points(own: float | None, dense: float | None) -> str:
    if own is None or dense is None:
        return MISSING
    return f"{100 * (own - dense):+.1f} points".replace("-", "\u2212")


TERMS = (
    "<p><strong>Output entropy (OE)</strong>: how undecided the model is on one question, averaged; 0 is certain, 1 is "
    "a four-way tie. <strong>Prediction entropy (PE)</strong>: how evenly it uses the four letters over the exam; 1 is "
    "even, 0 means always the same letter. <strong>Perplexity</strong>: how many tokens it hesitates between when it "
    "predicts the next one; lower is better. <strong>Geometry drift</strong>: mean absolute change of the similarity "
    "between layers against the dense model.</p>"
)


def run_notes(run: Run, item: Record, dense: Record) -> list[str]:
    notes = common_notes([item, dense])
    missing = [stage for stage in STAGES if stage not in run.stages and stage not in ("direct", "reparameterise")]
    if missing:
        notes.append(f"Not finished or not asked for: {', '.join(f'{stage}.json' for stage in missing)}.")
    if run.dense is None:
        notes.append("There is no dense reference run in this folder, so accuracies stand alone.")
    notes.append(
        "One run shows one depth. Zeroed linears and dropped blocks at the same depth are the baselines to compare "
        "with."
    )
    return notes


def run_page(run: Run) -> Page:
    """The page of one run, finished or not."""
    item = own_record(run)
    dense, model = dense_record(run, item), model_name(run.recipe) or run.name
    blocks = plural(item.depth or 0, "block")
    done = "evaluate" in run.stages
    name = f'<span class="model">{text(short_name(model))}</span>'
    if item.accuracy is not None:
        beside = f", against {percent(dense.accuracy)} dense" if dense.accuracy is not None else ""
        headline = f"{name} with {blocks} replaced: {percent(item.accuracy)} exam accuracy{beside}"
    else:
        headline = f"{name} with {blocks} replaced: {'no exam was taken' if done else 'not finished'}"
    words = saved_words(dense, item)
    lead = f'<p class="lead">Against the dense model: {words}.</p>' if words else ""
    if not done:
        lead += (
            '<p class="banner"><strong>Unfinished run.</strong> There is no evaluate.json; the page shows the stages '
            "that are done.</p>"
        )
    page = Page(
        f"{short_name(model)}: {run.name}",
        f"tensormix · run <strong>{text(run.name)}</strong> · model {text(model)}",
        headline,
        lead + key_figures(dense, item),
    )
    page.section("measures", "Beside the dense model", measures_table(item, dense), TERMS, subjects_table(item, dense))
    page.section(
        "language", "Beside what is saved", tradeoff_figure(dense, [item]), residual_figure([item]),
        details_table(dense, [item]),
    )  # fmt: skip
    page.section("dense", "Inside the dense model", *weight_figures(list(runs_of(run))))
    page.section(
        "resources", "What is saved", operator_figure([run]), storage_table([run]), resources_table(dense, [item])
    )
    page.section("healing", "Matching and recovery", loss_figure([item]), matching_figure(run))
    page.section("sites", "Sites", sites_table(run))
    page.section("notes", "Notes for an honest reading", listed(run_notes(run, item, dense)))
    page.section("settings", "Settings", facts_part(run, run.recipe), settings_part(run.recipe, "recipe.yaml"))
    page.section("environment", "Environment", environments_part(run))
    page.section("reproduce", "How to reproduce", reproduce_part("run", "recipe.yaml"))
    return page


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Folder names; where two are equal, with their parents' names before them."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{run.folder.resolve().parent.name}/{name}"
        for run, name in zip(runs, names, strict=True)
    ]


def comparison_table(items: Sequence[Record], models: Sequence[str], tokens: int | None) -> str:
    """One row per run."""
    texts = list(dict.fromkeys(name for item in items for name in item.perplexity))
    names = ["run", "model", "blocks_replaced", "parameters", "macs_per_token", "accuracy", "low", "high", "OE", "PE"]
    names += [*(f"perplexity {name}" for name in texts), "drift_all", "speedup"]
    heads = [
        "Run",
        "Model",
        nb("N_B"),
        "Parameters",
        "MACs<br><small>per token</small>",
        "Accuracy<br><small>95&nbsp;% interval</small>",
    ]
    heads += [
        "OE",
        "PE",
        *(f"Perplexity<br><small>{text(name)}</small>" for name in texts),
        "Drift<br><small>all pairs</small>",
    ]
    heads.append(
        "Speed<br><small>dense = 1</small>" if tokens is None else f"Speed<br><small>{plural(tokens, 'token')}</small>"
    )
    rows, data = [], []
    for item, model in zip(items, models, strict=True):
        ratio = item.speedup(tokens) if tokens is not None else None
        speed = MISSING if ratio is None else f"{ratio:.2f}×" + (", slower" if ratio < 0.985 else "")
        cells = [
            text(item.name),
            text(model),
            str(item.depth),
            count(item.resource("parameters")),
            count(item.resource("macs_per_token")),
        ]
        cells += [
            interval(item.accuracy, item.low, item.high),
            fixed(item.output_entropy),
            fixed(item.prediction_entropy),
        ]
        cells += [*(short(item.perplexity.get(name)) for name in texts), fixed(item.drift.get("all"), 4), speed]
        rows.append(("", cells))
        data.append(
            [
                item.name,
                model,
                item.depth,
                item.resource("parameters"),
                item.resource("macs_per_token"),
                item.accuracy,
                item.low,
                item.high,
                item.output_entropy,
                item.prediction_entropy,
                *(item.perplexity.get(name) for name in texts),
                item.drift.get("all"),
                ratio,
            ]
        )
    drawn = table("Runs", [(head, "" if i < 2 else "n") for i, head in enumerate(heads)], rows)
    return drawn + f'<p class="small">Download as {download("runs.csv", csv_text(names, data), "CSV")}</p>'


def comparison_page(runs: Sequence[Run]) -> Page:
    """Several runs in one table, with accuracy against cost."""
    names = unique_names(runs)
    items = [own_record(run, name) for run, name in zip(runs, names, strict=True)]
    models = [model_name(run.recipe) or MISSING for run in runs]
    lengths = [tokens for item in items for tokens in item.latency]
    page = Page("Comparison of runs", "tensormix · comparison", f"{len(runs)} runs compared")
    styles = {item.series: ROLE_LOOKS[i % len(ROLE_LOOKS)] for i, item in enumerate(items)}
    dense = next((d for d in map(dense_record, runs, items) if d.resources), Record("dense", depth=0, method="dense"))
    page.section("runs", "Runs", comparison_table(items, models, max(lengths, default=None)), TERMS)
    page.section("cost", "Accuracy and cost", size_figure(dense, items, styles), tradeoff_figure(dense, items, styles))
    page.section("geometry", "Inside the models", residual_figure(items, styles), entropy_trends(dense, items, styles))
    page.section("details", "Details", details_table(dense, items))
    page.section("resources", "Resources", operator_figure(runs), storage_table(runs), resources_table(dense, items))
    missing = [name for run, name in zip(runs, names, strict=True) if "evaluate" not in run.stages]
    notes = common_notes(items)
    if missing:
        notes.append(f"Not finished (no evaluate.json): {text(', '.join(missing))}.")
    if len(set(models)) > 1:
        notes.append(
            "The runs are of different models; changes are against the dense reference of the first run that has one."
        )
    page.section("notes", "Notes for an honest reading", listed(notes))
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        parts = (
            facts_part(run, run.recipe),
            settings_part(run.recipe, f"recipe-{index + 1}.yaml"),
            environments_part(run),
        )
        page.section(f"run-{index + 1}", f"Run {text(name)}", *parts)
    return page
