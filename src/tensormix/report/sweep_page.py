"""The page of a sweep: how many blocks can be replaced, and everything that this answer rests on."""

from __future__ import annotations

from markupsafe import Markup

from .boundary import boundaries, main_boundaries, num_blocks, sweep_model
from .costs import loss_figure, matching_figure, matching_source, size_figure
from .depths import accuracy_figure, perplexity_figure
from .drift import drift_map, drift_means
from .measures import Record, sweep_records
from .numbers import bytes_text, change, count, percent, short_name
from .page import Page, common_notes
from .read import Sweep, runs_of
from .rendering import say
from .scaling import operator_figure, trend_figure
from .tables import boundaries_table, cells_table, details_table, resources_table, unfinished_table
from .tradeoffs import entropy_trends, residual_figure, tradeoff_figure
from .weights import weight_figures

NULLS = ("zero", "drop_blocks")
SAVED = (("parameters", "parameters"), ("macs_per_token", "MACs per token"), ("bytes_on_disk", "bytes on disk"))
TILES = (
    ("Parameters", "parameters", count),
    ("MACs per token", "macs_per_token", count),
    ("On disk", "bytes_on_disk", bytes_text),
    ("Peak memory", "peak_memory_bytes", bytes_text),
)


def savings(dense: Record, at: Record | None) -> dict[str, list[tuple]]:
    """What a checkpoint saves: changes of its costs by name, dense/compressed times by tokens."""
    if at is None:
        return {"costs": [], "speeds": []}
    costs = [(name, at.resource(key), dense.resource(key)) for key, name in SAVED]
    return {
        "costs": [(name, change(own, whole)) for name, own, whole in costs if own is not None and whole],
        "speeds": [(tokens, at.speedup(tokens)) for tokens in sorted(at.latency)],
    }


def key_figures(dense: Record, at: Record | None) -> Markup | None:
    if at is None:
        return None
    items = []
    if at.accuracy is not None:
        items = [{"name": "Accuracy", "value": percent(at.accuracy), "remark": f"dense {percent(dense.accuracy)}"}]
    for name, key, show in TILES:
        own, whole = at.resource(key), dense.resource(key)
        if own is not None:
            items.append({"name": name, "value": change(own, whole), "remark": f"{show(whole)} → {show(own)}"})
    speeds = {tokens: ratio for tokens in at.latency if (ratio := at.speedup(tokens)) is not None}
    if speeds:
        ends = dict.fromkeys(f"{ratio:.2f}" for ratio in (min(speeds.values()), max(speeds.values())))
        lengths = " and ".join(map(str, sorted(speeds)))
        remark = f"dense = 1; {lengths} token{'s' * (list(speeds) != [1])}"
        items.append({"name": "Speed", "value": "\u2013".join(ends) + "×", "remark": remark})
    return say("parts", "tiles", items) if items else None


def partly(sweep: Sweep) -> list[tuple[str, list[str]]]:
    """Evaluated cells that lack the diagnose or profile stage although others have it (the dense model may)."""
    runs = [cell.run for cell in sweep.cells if cell.run is not None and cell.is_finished and cell.depth > 0]
    lacking = [(stage, [run.name for run in runs if stage not in run.stages]) for stage in ("diagnose", "profile")]
    return [(stage, names) for stage, names in lacking if 0 < len(names) < len(runs)]


def opened(sweep: Sweep, dense: Record, records: list[Record]) -> Page:
    """The page with its headline and what stands below it."""
    marks, model = boundaries(sweep), sweep_model(sweep)
    main = next(iter(main_boundaries(marks)), None)
    at = main.last_record(records) if main else None
    nulls = [mark for mark in marks if mark.series[0] in NULLS and mark.series[1] == "last"]
    farther = [
        null.label for null in nulls
        if main and main.value is not None and (null.value is None or null.value >= main.value)
    ]  # fmt: skip
    missing = [cell for cell in sweep.cells if not cell.is_finished]
    last = main.last_good if main else None
    no_exam = main is None and dense.accuracy is None and bool(dense.perplexity)
    series = {item.series for item in records}
    # Where nothing is MixT back to front and all is finished, no boundary of it is to come.
    side_by_side = 0 if missing or any(key[:2] == ("mixt", "last") for key in series) else len(series)
    banner = say("tops", "sweep_banner", len(missing), len(sweep.cells)) if missing else Markup()
    told = {"no_exam": no_exam, "side_by_side": side_by_side, **savings(dense, at)}
    lead = say("tops", "sweep_lead", main, nulls, farther, at, **told)
    return Page(
        title=f"{short_name(model)}: transition boundary",
        eyebrow=say("tops", "eyebrow", "sweep", sweep.name, model),
        headline=say("tops", "sweep_headline", model, num_blocks(sweep), main, last, side_by_side),
        lead=[lead, key_figures(dense, at) or Markup(), banner],
    )


def notes(sweep: Sweep, dense: Record, records: list[Record]) -> Markup:
    return say(
        "notes",
        "sweep",
        common=common_notes([dense, *records]),
        main=next(iter(main_boundaries(boundaries(sweep))), None),
        nulls=[item for item in records if item.method in NULLS],
        is_both=any(item.direction == "first" for item in records),
        has_dense=sweep.dense is not None,
        partly=partly(sweep),
        missing=[cell for cell in sweep.cells if not cell.is_finished],
        num_cells=len(sweep.cells),
    )


def sweep_page(sweep: Sweep) -> Page:
    """The page of one sweep, finished or not."""
    dense, records = sweep_records(sweep)
    runs, marks = list(runs_of(sweep)), boundaries(sweep)
    page = opened(sweep, dense, records)
    if not records:
        words = "No cell has been evaluated yet, so there is nothing to draw."
        page.section("boundary", "Where accuracy breaks", say("parts", "empty", words))
    accuracy = (accuracy_figure(dense, records, marks), entropy_trends(dense, records))
    page.section("boundary", "Where accuracy breaks", *accuracy, boundaries_table(marks, records))
    page.section("geometry", "Inside the model", drift_map(records, marks), drift_means(records, marks, sweep.boundary))
    quality = (tradeoff_figure(dense, records), residual_figure(records), details_table(dense, records))
    page.section("language", "Language modelling", perplexity_figure(dense, records, marks), *quality)
    page.section("dense", "Inside the dense model", *weight_figures(runs))
    sizes = (size_figure(dense, records), trend_figure(sweep.boundary), operator_figure(runs))
    page.section("resources", "What is saved", *sizes, resources_table(dense, records, marks) if records else None)
    page.section("healing", "Matching and recovery", loss_figure(records), matching_figure(matching_source(sweep)))
    page.section("cells", "All cells", cells_table(dense, records, marks) if records else None)
    missing = [cell for cell in sweep.cells if not cell.is_finished]
    page.section("unfinished", "Not finished", unfinished_table(missing))
    page.section("notes", "Notes for an honest reading", notes(sweep, dense, records))
    page.about(sweep, sweep.settings, "sweep", "sweep.yaml")
    return page
