"""The page of a sweep: how many blocks can be replaced, and everything that this answer rests on."""

from __future__ import annotations

from .accounts import details_table
from .costs import loss_figure, matching_figure, matching_source, size_figure
from .drift import drift_map, drift_means
from .figures import accuracy_figure, main_boundaries, perplexity_figure
from .measures import Boundary, Record, boundaries, last_on_plateau, num_blocks, sweep_model, sweep_records
from .numbers import bytes_text, change, count, nb, percent, plural, short, short_name, speed, text
from .page import Page, common_notes, environments_part, facts_part, listed, reproduce_part, settings_part, tiles
from .read import Cell, Sweep, runs_of
from .scaling import operator_figure, trend_figure
from .tables import boundaries_table, cells_table, resources_table, unfinished_table
from .tradeoffs import entropy_trends, residual_figure, tradeoff_figure
from .weights import weight_figures


def headline(model: str, total: int | None, main: Boundary | None, at: Record | None) -> str:
    """The answer in one sentence, as HTML."""
    name = f'<span class="model">{text(short_name(model))}</span>'
    if main is None:
        return f"How many blocks of {name} can be replaced is not known yet"
    of = f" of {total}" if total is not None else ""
    last = main.last_good if main.last_good is not None else (at.depth if at else None)
    if main.value is None:
        scanned = f"up to {short(last)}{of} blocks replaced" if last is not None else "in the scanned range"
        return f"{name} keeps its exam accuracy: it does not leave its plateau {scanned}"
    if not last:
        return f"No block of {name} can be replaced before exam accuracy leaves its plateau"
    blocks = "block" if last == 1 and not of else "blocks"
    return f"{short(last)}{of} {blocks} of {name} can be replaced before exam accuracy leaves its plateau"


def saved_words(dense: Record, at: Record) -> str:
    """What is saved at a checkpoint, for the lead sentence."""
    parts = []
    for key, name in (
        ("parameters", "parameters"),
        ("macs_per_token", "MACs per token"),
        ("bytes_on_disk", "bytes on disk"),
    ):
        value, reference = at.resource(key), dense.resource(key)
        if value is not None and reference:
            parts.append(f"<strong>{change(value, reference)}</strong> {name}")
    speeds = [f"{speed(at.speedup(tokens))} at {plural(tokens, 'token')}" for tokens in sorted(at.latency)]
    said = ", ".join(parts)
    if speeds:
        said += f"{'; ' if said else ''}measured speed against dense: {', '.join(speeds)}"
    return said


def null_words(main: Boundary, nulls: list[Boundary]) -> str:
    """How far the null baselines come; said plainly if MixT does not come further."""
    said = [f"{'never' if n.value is None else f'at {short(n.value)}'} for {text(n.label)}" for n in nulls]
    words = f"For comparison, the plateau ends {' and '.join(said)}."
    farther = [n for n in nulls if n.value is None or (main.value is not None and n.value >= main.value)]
    if farther and main.value is not None:
        names = " and ".join(text(n.label) for n in farther)
        words += f" <strong>MixT does not outlast {names} in this sweep.</strong>"
    return words


def lead(dense: Record, main: Boundary | None, at: Record | None, others: list[Boundary]) -> str:
    if main is None and dense.accuracy is None and dense.perplexity:
        return (
            '<p class="lead">No exam was asked of this model, so there is no accuracy and no boundary of it. '
            "How the perplexity grows is shown below.</p>"
        )
    if main is None:
        return (
            '<p class="lead">The sweep has not written a boundary: it needs the dense model and at least two finished '
            "depths of MixT, back to front. What is finished is shown below.</p>"
        )
    sentences = []
    if main.value is not None:
        span = f" ({main.confidence} interval {main.interval})" if main.interval else " (no interval written)"
        sentences.append(
            nb(f"With {text(main.label)}, replaced back to front, the boundary is at N_B = {short(main.value)}{span}.")
        )
        if main.last_good is not None and main.value - main.last_good > 1:
            between = f"{main.last_good + 1:.0f} to {main.value - 1:.0f}"
            sentences.append(f"Depths {between} were not scanned, so the true boundary may lie there.")
    elif main.row.get("sentence"):
        sentences.append(f"{text(main.row['sentence']).capitalize()}.")
    sentences += [null_words(main, others)] if others else []
    if at is not None:
        words = saved_words(dense, at)
        sentences.append(
            nb(f"Saved at N_B = {at.depth}: {words}.") if words else nb(f"N_B = {at.depth} has not been profiled.")
        )
    return f'<p class="lead">{" ".join(sentences)}</p>'


def key_figures(dense: Record, at: Record | None) -> str:
    if at is None:
        return ""
    items = [("Accuracy", percent(at.accuracy), f"dense {percent(dense.accuracy)}")]
    shows = (
        ("Parameters", "parameters", count),
        ("MACs per token", "macs_per_token", count),
        ("On disk", "bytes_on_disk", bytes_text),
        ("Peak memory", "peak_memory_bytes", bytes_text),
    )
    for name, key, show in shows:
        value, reference = at.resource(key), dense.resource(key)
        if value is not None:
            items.append((name, change(value, reference), f"{show(reference)} → {show(value)}"))
    speeds = {tokens: at.speedup(tokens) for tokens in at.latency}
    known = {tokens: ratio for tokens, ratio in speeds.items() if ratio is not None}
    if known:
        ends = list(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(known.values()), max(known.values()))))
        lengths = " and ".join(map(str, sorted(known)))
        items.append(("Speed", "\u2013".join(ends) + "×", f"dense = 1; {lengths} token{'s' * (list(known) != [1])}"))
    return tiles(items)


def unfinished(sweep: Sweep) -> list[Cell]:
    return [cell for cell in sweep.cells if cell.run is None or "evaluate" not in cell.run.stages]


def partly(sweep: Sweep) -> list[str]:
    """Evaluated cells that lack the diagnose or profile stage although others have it, as sentences."""
    runs = [cell.run for cell in sweep.cells if cell.run is not None and "evaluate" in cell.run.stages]
    found = []
    for stage in ("diagnose", "profile"):
        names = [run.name for run in runs if stage not in run.stages]
        if names and len(names) < len(runs):
            found.append(f"Without {stage}.json, so without its numbers: {text(', '.join(names))}.")
    return found


def banner(sweep: Sweep, missing: list[Cell]) -> str:
    if not missing:
        return ""
    return (
        f'<p class="banner"><strong>Unfinished sweep.</strong> {len(missing)} of {plural(len(sweep.cells), "cell")} '
        f"{'is' if len(missing) == 1 else 'are'} not finished; the page shows the others. "
        '<a href="#unfinished">Which ones</a></p>'
    )


def sweep_notes(
    sweep: Sweep, dense: Record, records: list[Record], main: Boundary | None, missing: list[Cell]
) -> list[str]:
    notes = common_notes([dense, *records])
    if main is not None and main.value is not None:
        plateau = main.row.get("plateau")
        said = f" The plateau is {percent(plateau)}." if isinstance(plateau, float) else ""
        notes.append(
            f"The boundary is the first {nb('N_B')} from which accuracy stays below the plateau.{said} Its "
            f"{main.confidence} interval comes from drawing the answers anew many times and searching again; it holds "
            "the error of sampling questions, not the choice of model, seed or recovery budget."
        )
    nulls = {item.method for item in records} & {"zero", "drop_blocks"}
    if not nulls:
        notes.append(
            "No null baseline (zeroed linears, dropped blocks) is in this sweep. Without one nobody can tell how much "
            "of the accuracy is due to MixT and how much to the blocks that were left alone."
        )
    if not any(item.direction == "first" for item in records):
        notes.append("No front-to-back cell is in this sweep, so it cannot show that the order matters.")
    if sweep.dense is None:
        notes.append(
            "There is no dense reference run; changes are against dense rows of the cells where they have them."
        )
    notes += partly(sweep)
    if missing:
        notes.append(f"{plural(len(missing), 'cell')} not finished: {text(', '.join(cell.name for cell in missing))}.")
    else:
        notes.append(f"All {plural(len(sweep.cells), 'cell')} of the sweep are finished.")
    return notes


def sweep_page(sweep: Sweep) -> Page:
    """The page of one sweep, finished or not."""
    dense, records = sweep_records(sweep)
    runs = list(runs_of(sweep))
    marks, missing, model = boundaries(sweep), unfinished(sweep), sweep_model(sweep)
    main = next(iter(main_boundaries(marks)), None)
    at = last_on_plateau(records, main) if main else None
    nulls = [mark for mark in marks if mark.method in ("zero", "drop_blocks") and mark.direction == "last"]
    page = Page(
        title=f"{short_name(model)}: transition boundary",
        eyebrow=f"tensormix · sweep <strong>{text(sweep.name)}</strong> · model {text(model)}",
        headline=headline(model, num_blocks(sweep), main, at),
        lead=lead(dense, main, at, nulls) + key_figures(dense, at) + banner(sweep, missing),
    )
    nothing = "" if records else '<p class="none">No cell has been evaluated yet, so there is nothing to draw.</p>'
    page.section(
        "boundary",
        "Where accuracy breaks",
        nothing,
        accuracy_figure(dense, records, marks),
        entropy_trends(dense, records),
        boundaries_table(marks, records),
    )
    page.section("geometry", "Inside the model", drift_map(records, marks), drift_means(records, marks, sweep.boundary))
    page.section(
        "language",
        "Language modelling",
        perplexity_figure(dense, records, marks),
        tradeoff_figure(dense, records),
        residual_figure(records),
        details_table(dense, records),
    )
    page.section("dense", "Inside the dense model", *weight_figures(runs))
    page.section(
        "resources",
        "What is saved",
        size_figure(dense, records),
        trend_figure(sweep.boundary),
        operator_figure(runs),
        resources_table(dense, records, marks) if records else "",
    )
    page.section("healing", "Matching and recovery", loss_figure(records), matching_figure(matching_source(sweep)))
    page.section("cells", "All cells", cells_table(dense, records, marks) if records else "")
    page.section("unfinished", "Not finished", unfinished_table(missing) if missing else "")
    page.section("notes", "Notes for an honest reading", listed(sweep_notes(sweep, dense, records, main, missing)))
    settings = sweep.settings or sweep.raw
    page.section("settings", "Settings", facts_part(sweep, settings), settings_part(settings, "sweep.yaml"))
    page.section("environment", "Environment", environments_part(sweep))
    page.section("reproduce", "How to reproduce", reproduce_part("sweep", "sweep.yaml"))
    return page
