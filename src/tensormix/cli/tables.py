"""What the command line tells people, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tensormix.rows import Row
from tensormix.rows.labels import text_name


def show_check(console: Console, result: dict[str, Any]) -> None:
    """What each kind of site becomes, what a budget or a search has to say, and the whole model before and after.

    First of all that it becomes larger, if it does.
    """
    show_growth(console, result.get("larger"))
    for note in result.get("notes", ()):
        console.print(f"Note: {note}.", markup=False)
    if result["sites"]:
        console.print(_sites_table(result["sites"]))
        if "search" in result:
            search = result["search"]
            console.print(
                "Which of these sites are reduced, and how far, a run finds by trying, with the whole model in memory: "
                f"{search['candidates']} candidates, at most {search['evaluations']} evaluations. It cannot be known "
                "here; the smallest candidate at every site is counted, and the dense model may win."
            )
        elif result["assumed"] and "budget" not in result:
            console.print("Which blocks a rule chooses is measured in a run; the last that it could are counted here.")
        console.print()
    if "budget" in result:
        show_budget(console, result["budget"][0], result["assumed"])
    console.print(_model_table(result["dense"], result["compressed"]))


def show_growth(console: Console, sentence: str | None) -> None:
    """That a compressed model is larger than its source, if it is."""
    if sentence:
        console.print(f"[yellow]{escape(sentence)}[/yellow]", soft_wrap=True)


def _sites_table(sites: list[dict[str, Any]]) -> Table:
    """One row for all sites of a kind: the same role, sizes, method and operator."""
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    for site in sites:
        key = (site["role"] or site["site"], *(site[k] for k in ("in_features", "out_features", "method", "operator")))
        kinds.setdefault(key, []).append(site)
    table = Table("site", "sites", "in", "out", "method", "operator", "parameters", "MACs per token", box=None)
    for (role, inputs, outputs, method, operator), same in kinds.items():
        first = same[0]
        table.add_row(
            role,
            f"{len(same)} in blocks {blocks_text([site['block'] for site in same])}",
            f"{inputs or '-'}",
            f"{outputs or '-'}",
            method,
            operator,
            f"{first['dense_parameters']:,} -> {first['parameters']:,}",
            f"{first['dense_macs_per_token']:,} -> {first['macs_per_token']:,}",
        )
    return table


def _model_table(dense: dict[str, Any], compressed: dict[str, Any]) -> Table:
    table = Table("whole model", "dense", "compressed", "change", box=None)
    rows = [("parameters", dense["parameters"], compressed["parameters"])]
    rows += [("MACs per token (linear layers and lm_head)", dense["macs_per_token"], compressed["macs_per_token"])]
    rows += [(f"bytes in {dtype}", size, compressed["bytes"][dtype]) for dtype, size in dense["bytes"].items()]
    for name, before, after in rows:
        table.add_row(name, f"{before:,}", f"{after:,}", f"{100 * (after / before - 1):+.2f} %")
    return table


def show_budget(console: Console, total: dict[str, Any], assumed: bool) -> None:
    """What the budget asks for and what the sizes come to."""
    console.print(
        f"budget: {total['asked']:,} of {total['dense']:,} {total['of']} (keep {total['keep']:g} of the "
        f"{total['over']}); the sizes above come to {total['achieved']:,} ({total['achieved_keep']:.4f})"
    )
    if assumed and total["by"] == "auto":
        console.print("The run measures what each method loses; those above are one choice that costs about as much.")
    elif assumed:
        console.print("The run decides the sizes from weights or inputs; those above are what by: uniform would give.")
    console.print()


def blocks_text(blocks: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for block in sorted(set(blocks)):
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def show_prediction(console: Console, rows: list[dict[str, Any]]) -> None:
    """The signals of every depth, where each rises most, and the boundary that they say together."""
    signals = list(dict.fromkeys(row["signal"] for row in rows if row["kind"] == "signal"))
    values = {(row["signal"], row["depth"]): row["value"] for row in rows if row["kind"] == "signal"}
    said = {row["signal"]: row for row in rows if row["kind"] == "prediction"}
    table = Table("N_B", *signals, box=None)
    for depth in range(max(depth for _, depth in values) + 1):
        marks = ["  <- rises most" if said[signal]["depth"] == depth else "" for signal in signals]
        table.add_row(str(depth), *(f"{values[s, depth]:.4g}{mark}" for s, mark in zip(signals, marks, strict=True)))
    console.print(table)
    found = said["all"]
    console.print(f"Predicted boundary: {found['depth']} (the signals say {found['low']} to {found['high']})")


def show_results(console: Console, measured: Mapping[str, Sequence[Row]]) -> None:
    """What evaluate measured of each model: a line for each text, exam and benchmark. Nothing where nothing was."""
    columns = {name: dict(_results(rows)) for name, rows in measured.items() if rows}
    labels = dict.fromkeys(label for found in columns.values() for label in found)
    if not labels:
        return
    table = Table("", *columns, box=None, pad_edge=False)
    for label in labels:
        table.add_row(label, *(found.get(label, "") for found in columns.values()))
    console.print(table)


def show_recovery(console: Console, rows: Sequence[Row]) -> None:
    """What a user must know of a recovery: a rate that is too high, a last state that was not the best."""
    for row in rows:
        if row["kind"] in ("rate", "kept") and row["said"]:
            console.print(f"[yellow]{escape(row['said'])}[/yellow]")


def _results(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Perplexities, divergences and accuracies over all subjects; what is measured of one text twice is numbered."""
    seen: dict[str, int] = {}
    for row in rows:
        if row["kind"] in ("perplexity", "kl"):
            label, value = f"{'KL' if row['kind'] == 'kl' else 'perplexity'}, {text_name(row)}", f"{row['value']:.4g}"
        elif row["kind"] == "accuracy" and row.get("subject", "all") == "all":
            label, value = f"accuracy, {row['task']}", f"{100 * row['value']:.1f} %"
        else:
            continue
        seen[label] = seen.get(label, 0) + 1
        yield label if seen[label] == 1 else f"{label} ({seen[label]})", value


def show_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys; a list in one is written with commas."""
    table = Table(*rows[0].keys(), box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(", ".join(value) if isinstance(value, list) else str(value) for value in row.values()))
    console.print(table)
