"""The page of a comparison: quality against what is stored and against speed, with what nothing else beats marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .chart import Chart, chart
from .figure import Column, Figure, Shown, Table, data, figure, table
from .measures import Record, record
from .numbers import METHODS, MINUS, MISSING, NARROW, percent, plural, short
from .page import Page, common_notes
from .pareto import Entry, Measure, Spread, entries, frontier, lengths_of, losers, measures_of, winners
from .parts import Level, Line, Part, Point, Series
from .read import Contest
from .rendering import say
from .scales import Axis
from .series import DENSE, look
from .svg import Style

NULLS = {
    "zero": Style("c-orange", "square", hollow=True),
    "mean_output": Style("c-ink", "cross", hollow=True),
    "drop_blocks": Style("c-purple", "triangle", hollow=True),
}
OTHER_NULL = Style("c-ink", "circle", hollow=True)


@dataclass(frozen=True)
class Cost:
    """What quality is drawn against; the dense model has 1."""

    key: str
    title: str
    label: str
    of: Callable[[Entry], Spread | None]
    sign: int = 1  # -1: more is better


def costs_of(items: Sequence[Entry], dense_bits: float | None) -> list[Cost]:
    """Stored bits where those of the source are known, then speed for each number of tokens."""

    def bits(item: Entry) -> Spread | None:
        stored = item.stated("bits")
        return stored / dense_bits if stored and dense_bits else None

    found = [Cost("pareto", "Quality against stored bits", "stored bits, dense = 1", bits)] if dense_bits else []
    for tokens in lengths_of(items):
        words = plural(tokens, "token")
        title, label = f"Quality against measured speed, {words}", f"speed at {words}, dense = 1"
        found.append(Cost(f"speed-{tokens}", title, label, lambda item, num=tokens: item.speed(num), sign=-1))
    return found


def styles_of(items: Sequence[Entry]) -> dict[str, Style]:
    """A colour and a shape for each label; the null baselines are hollow and dashed in all comparisons."""
    methods = {item.label: item for item in items}
    taken = [label for label, item in methods.items() if not item.null]
    styles = {label: NULLS.get(item.method, OTHER_NULL) for label, item in methods.items() if item.null}
    for i, label in enumerate(taken):
        styles[label] = look(i)
    return {label: styles[label] for label in methods}


def _chart(
    items: Sequence[Entry], styles: dict[str, Style], measure: Measure, cost: Cost, dense: Record
) -> Chart | None:
    """Quality of every entry against one cost; the line through the frontier, the dense model and its level."""
    placed = {
        item: (c, q) for item in items if (c := cost.of(item)) is not None and (q := measure.of(item)) is not None
    }
    if not placed:
        return None
    edge = frontier([*placed], cost.of, measure.of, measure.sign, cost.sign)

    def point(item: Entry) -> Point:
        c, q = placed[item]
        span = f" ({measure.span(q)} over seeds)" if measure.span(q) else ""
        where = f"{item.title}, keep {item.keep:g}: {cost.label} {short(c.mean)}"
        words = f"{where}, {measure.name} {measure.show(q.mean)}{span}"
        return Point(c.mean, q.mean, words + (", on the frontier" if item in edge else ""), q.low, q.high)

    parts: list[Part] = [Line([point(item)[:2] for item in edge], Style("c-ink fit"), "frontier")]
    for label, style in styles.items():
        own = sorted((item for item in placed if item.label == label), key=lambda item: item.keep)
        parts += [Series([point(item) for item in own], style, own[0].title, line=True)] if own else []
    log = measure.kind != "accuracy" and all(q.low > 0 for _, q in placed.values())
    level = measure.of_record(dense)
    if level is not None and (level > 0 or not log):
        words = measure.show(level)
        parts.insert(0, Series([Point(1.0, level, f"dense model: {words}")], DENSE, "dense model"))
        parts.append(Level(level, f"dense {words}", at_end=False))
    title = f"{measure.name}{f': {measure.text}' if measure.text else ''}"
    return chart(title, Axis(cost.label, include=(1.0,)), Axis(format=measure.show, log=log), parts)


def cost_figure(items: Sequence[Entry], styles: dict[str, Style], dense: Record, cost: Cost) -> Figure | None:
    measures = measures_of(items)
    charts = [_chart(items, styles, measure, cost, dense) for measure in measures]

    def mean(of: Callable[[Entry], Spread | None]) -> Callable[[Entry], float | None]:
        return lambda item: None if (value := of(item)) is None else value.mean

    columns = {"method": "label", "keep": "keep", "seeds": lambda item: len(item.rows), cost.label: mean(cost.of)}
    columns |= {f"{measure.kind} {measure.text}".strip(): mean(measure.of) for measure in measures}
    drawn = [one for one in charts if one is not None]
    return figure(cost.key, cost.title, drawn, data(items, columns), caption=cost.key.partition("-")[0])


def result_table(items: Sequence[Entry], dense: Record, dense_bits: float | None) -> Table:
    """All cells, by budget: what was asked, what it came to, what was measured; the frontier of each measure marked."""
    measures = measures_of(items)
    edges = {
        measure: frontier(items, lambda item: item.stated("bits"), measure.of, measure.sign) for measure in measures
    }

    def stated(key: str, sign: str = "") -> Callable[[Entry], str]:
        def cell(item: Entry) -> str:
            value = item.stated(key)
            return MISSING if value is None else f"{value.mean:{sign}.4f}".replace("-", MINUS)

        return cell

    def bits(item: Entry) -> str:
        stored = item.stated("bits")
        return percent(stored.mean / dense_bits) if stored and dense_bits else MISSING

    def quality(item: Entry, measure: Measure) -> Shown | str:
        value, mark = measure.of(item), "● " if item in edges[measure] else ""
        return MISSING if value is None else Shown(mark + measure.show(value.mean), measure.span(value))

    def speed(item: Entry, tokens: int) -> str:
        return "" if (value := item.speed(tokens)) is None else f"{value.mean:.2f}×"

    columns = [
        Column("Method", lambda item: item.title),
        Column("Seeds", lambda item: str(len(item.rows))),
        Column("Achieved keep", stated("achieved_keep")),
        Column("Misses budget by", stated("missed_by", "+")),
        Column("Stored bits", bits),
        *(Column(m.name, lambda item, m=m: quality(item, m), m.text) for m in measures),
        *(Column("Speed", lambda item, n=n: speed(item, n), plural(n, "token")) for n in lengths_of(items)),
    ]
    whole = ["dense", "", "1", "", f"100{NARROW}%" if dense_bits else MISSING]
    whole += [*(measure.show(measure.of_record(dense)) for measure in measures), *[MISSING] * len(lengths_of(items))]
    order = sorted(items, key=lambda i: (-i.keep, i.null, q.mean if (q := measures[0].of(i)) else 0.0))
    return table(
        "All cells of the comparison", columns, order, lambda item: any(item in edge for edge in edges.values()),
        lambda item: f"keep {item.keep:g}", first=whole, caption="● on the frontier of stored bits and this measure",
    )  # fmt: skip


def pareto_page(source: Contest) -> Page:
    """The page of one comparison folder, finished or not."""
    items, dense = entries(source), record(source.dense, "dense", dense=True, depth=0, method="dense")
    styles, done = styles_of(items), sum(run is not None and "evaluate" in run.stages for _, run in source.cells)
    measures, nulls = measures_of(items), sorted({METHODS.get(i.method, i.method) for i in items if i.null})
    model = str((source.settings.get("recipe") or {}).get("model") or source.name)
    best, worst = (choose(items, measures[0]) if measures else [] for choose in (winners, losers))
    page = Page(
        title=f"tensormix: {source.name}",
        eyebrow=say("tops", "comparison_eyebrow", source.name, done, len(source.cells)),
        headline=say("tops", "comparison_headline", model, best),
        lead=[say("tops", "comparison_lead", len({row["seed"] for row, _ in source.cells}), nulls, worst)],
    )
    figures = {cost.key: cost_figure(items, styles, dense, cost) for cost in costs_of(items, source.dense_bits)}
    page.section("pareto-part", "Quality against cost", figures.pop("pareto", None))
    none = say("parts", "empty", "No cell is finished yet.")
    page.section("table", "All cells", result_table(items, dense, source.dense_bits) if measures else none)
    page.section("speed", "Quality against speed", *figures.values())
    reasons = {row["impossible"]: row["cell"] for row, _ in source.cells if row["impossible"]}
    page.section("impossible", "Budgets that could not be met", say("tops", "impossible", reasons) if reasons else None)
    notes = say("notes", "comparison", common_notes([dense, *(r for item in items for r in item.records)]))
    page.section("notes", "How to read this", notes)
    page.about(source, source.settings, "compare", f"{source.name}.json")
    return page
