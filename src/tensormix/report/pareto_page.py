"""The page of a comparison: quality against what is stored and against speed, with what nothing else beats marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .figure import DENSE, ROLE_LOOKS, Figure
from .measures import Record, record
from .numbers import METHODS, MISSING, percent, plural, short, short_name, text
from .page import Page, common_notes, environments_part, facts_part, listed, reproduce_part, settings_part
from .pareto import KL, Entry, Spread, entries, frontier
from .read import Contest
from .svg import Panel, Point, Style, padded
from .tables import table

NULL_LOOKS = {
    "zero": Style("c-orange", "square", hollow=True),
    "mean_output": Style("c-ink", "cross", hollow=True),
    "drop_blocks": Style("c-purple", "triangle", hollow=True),
}
EDGE = Style("c-ink", "circle", hollow=True)
NAMES = {"perplexity": "Perplexity", KL: "KL from the dense model, nats", "accuracy": "Exam accuracy"}


def looks_of(items: Sequence[Entry]) -> dict[str, Style]:
    """A colour and a shape for each label; the null baselines are hollow and dashed in all comparisons."""
    styles: dict[str, Style] = {}
    for item in items:
        if item.label not in styles and item.null:
            styles[item.label] = NULL_LOOKS.get(item.method, EDGE)
        elif item.label not in styles:
            taken = sum(label for label in (not hollow.hollow for hollow in styles.values()))
            look = ROLE_LOOKS[taken % len(ROLE_LOOKS)]
            shape = ROLE_LOOKS[(taken + taken // len(ROLE_LOOKS)) % len(ROLE_LOOKS)].shape
            styles[item.label] = Style(look.colour, shape)
    return styles


def measures_of(items: Sequence[Entry]) -> list[tuple[str, str]]:
    """(measure, text) of everything that was measured, perplexities first."""
    texts = list(dict.fromkeys(name for item in items for r in item.records for name in r.perplexity))
    found = [("perplexity", name) for name in texts]
    found += [(KL, name) for name in dict.fromkeys(name for item in items for seed in item.kl for name in seed)]
    return found + [("accuracy", "")] * any(item.quality("accuracy", "") for item in items)


def _words(measure: str, value: Spread) -> str:
    show = percent if measure == "accuracy" else short
    words = f"{NAMES[measure]} {show(value.mean)}"
    return words if value.low == value.high else f"{words} ({show(value.low)} to {show(value.high)} over seeds)"


def _panel(
    items: Sequence[Entry],
    styles: dict[str, Style],
    measure: str,
    name: str,
    x: Callable[[Entry], Spread | None],
    x_label: str,
    dense: tuple[float, float | None],
    sign_x: int = 1,
) -> str | None:
    """Quality of every entry against one cost; the line through the frontier, the dense model and its level."""
    placed = [i for i in items if x(i) is not None and i.quality(measure, name) is not None]
    if not placed:
        return None
    spreads = {item: (x(item), item.quality(measure, name)) for item in placed}
    log = measure != "accuracy" and all(s[1] is not None and s[1].low > 0 for s in spreads.values())
    ends = [v for _, q in spreads.values() if q is not None for v in (q.low, q.high)]
    ends += [dense[1]] if dense[1] is not None and (dense[1] > 0 or not log) else []
    xs = [c.mean for c, _ in spreads.values() if c is not None] + [dense[0]]
    title = f"{NAMES[measure]}{f': {name}' if name else ''}"
    panel = Panel(
        padded(xs), padded(ends, log=log), title=title, x_label=x_label, log_y=log,
        y_format=percent if measure == "accuracy" else short,
        description=f"{title} against {x_label}; values are in the table below",
    )  # fmt: skip
    if dense[1] is not None and (dense[1] > 0 or not log):
        panel.horizontal(dense[1], f"dense {_short(measure, dense[1])}", "level", at_end=False)
    edge = frontier(
        placed,
        (lambda i: _negated(x(i))) if sign_x < 0 else x,
        lambda i: i.quality(measure, name),
        -1 if measure == "accuracy" else 1,
    )
    line = [(c.mean, q.mean) for i in edge for c, q in [spreads[i]] if c is not None and q is not None]
    if len(line) > 1:
        panel.line(line, Style("c-ink fit"))
    for label, style in styles.items():
        points = []
        for item in sorted((i for i in placed if i.label == label), key=lambda i: i.keep):
            cost, quality = spreads[item]
            assert cost is not None and quality is not None
            mark = ", on the frontier" if item in edge else ""
            tip = f"{item.title}, keep {item.keep:g}: {x_label} {short(cost.mean)}, {_words(measure, quality)}{mark}"
            points.append(Point(cost.mean, quality.mean, tip, quality.low, quality.high))
        panel.series(points, style)
    if dense[1] is not None and (dense[1] > 0 or not log):
        panel.points([Point(dense[0], dense[1], f"dense model: {_short(measure, dense[1])}")], DENSE)
    return panel.svg()


def _negated(value: Spread | None) -> Spread | None:
    return None if value is None else Spread(-value.mean, -value.high, -value.low)


def _short(measure: str, value: float) -> str:
    return percent(value) if measure == "accuracy" else short(value)


def _dense_quality(dense: Record, measure: str, name: str) -> float | None:
    if measure == KL:
        return 0.0
    return dense.accuracy if measure == "accuracy" else dense.perplexity.get(name)


def _figure(
    key: str,
    title: str,
    items: Sequence[Entry],
    styles: dict[str, Style],
    dense: Record,
    x: Callable[[Entry], Spread | None],
    x_label: str,
    dense_x: float,
    explanation: str,
    sign_x: int = 1,
) -> Figure | None:
    asked = measures_of(items)
    panels = [_panel(items, styles, m, n, x, x_label, (dense_x, _dense_quality(dense, m, n)), sign_x) for m, n in asked]
    if not any(panels):
        return None
    columns = ["method", "keep", "seeds", x_label, *(f"{m} {n}".strip() for m, n in asked)]
    rows = []
    for item in items:
        values = [x(item), *(item.quality(m, n) for m, n in asked)]
        rows.append([item.label, item.keep, len(item.rows), *(None if v is None else v.mean for v in values)])
    legend = [(DENSE, "dense model"), (Style("c-ink fit", "circle"), "frontier")]
    legend += [(style, next(i.title for i in items if i.label == label)) for label, style in styles.items()]
    return Figure(key, title, [p for p in panels if p], explanation, columns, rows, legend)


BITS_TEXT = (
    "<p>Down and to the left is better (up, for accuracy). The thick line joins what <strong>nothing beats</strong>: "
    "no other cell stores as little and is better. Each mark is the mean over seeds, its bar goes from the least to "
    "the largest seed. Hollow marks with dashed lines are the null baselines: sites zeroed, sites replaced by their "
    "mean output, blocks dropped, each where the model loses least. A method earns its bits only where it lies below "
    "all of them.</p><p>Stored bits are those of every tensor that is saved, scales, indices, embeddings and norms "
    "included, as a fraction of the source checkpoint.</p>"
)
SPEED_TEXT = (
    "<p>Measured in the run of each cell beside the dense model; 1 is as fast as dense, more is faster. Down and to "
    "the right is better. What stores less need not be faster: quantised and sparse layers are unpacked at every call."
    "</p>"
)


def result_table(items: Sequence[Entry], dense: Record, dense_bits: float | None) -> str:
    """All cells, by budget: what was asked, what it came to, what was measured; the frontier of each measure marked."""
    asked = measures_of(items)
    edges = {
        m: frontier(items, lambda i: i.bits, lambda i, m=m: i.quality(*m), -1 if m[0] == "accuracy" else 1)
        for m in asked
    }
    lengths = sorted({tokens for item in items for r in item.records for tokens in r.latency})
    columns = [("Method", ""), ("Seeds", "n"), ("Achieved keep", "n"), ("Misses budget by", "n"), ("Stored bits", "n")]
    columns += [(f"{NAMES[m]}<br><small>{text(n)}</small>", "n") for m, n in asked]
    columns += [(f"Speed<br><small>{plural(tokens, 'token')}</small>", "n") for tokens in lengths]
    blank = [MISSING] * len(lengths)
    shown = [_short(m, v) if (v := _dense_quality(dense, m, n)) is not None else MISSING for m, n in asked]
    lines: list[tuple[str, list[str]]] = [
        ("", ["dense", "", "1", "", "100\u00a0%" if dense_bits else MISSING, *shown, *blank])
    ]
    for keep in sorted({item.keep for item in items}, reverse=True):
        lines.append(("group", [f"keep {keep:g}"]))
        group = [item for item in items if item.keep == keep]
        for item in sorted(group, key=lambda i: (i.null, q.mean if (q := i.quality(*asked[0])) else 0)):
            cells = [text(item.title), str(len(item.rows)), _of(item.achieved, 4), _of(item.missed, 4, sign=True)]
            cells.append(percent(item.bits.mean / dense_bits) if item.bits and dense_bits else MISSING)
            marked = False
            for measure in asked:
                value = item.quality(*measure)
                on_edge = item in edges[measure]
                marked = marked or on_edge
                cells.append(_cell(measure[0], value, on_edge))
            cells += ["" if (s := item.speed(tokens)) is None else f"{s.mean:.2f}×" for tokens in lengths]
            lines.append(("marked" if marked else "", cells))
    return table("All cells of the comparison", columns, lines, "● on the frontier of stored bits and this measure")


def _of(value: Spread | None, digits: int, sign: bool = False) -> str:
    return MISSING if value is None else f"{value.mean:{'+' if sign else ''}.{digits}f}".replace("-", "\u2212")


def _cell(measure: str, value: Spread | None, on_edge: bool) -> str:
    if value is None:
        return MISSING
    span = "" if value.low == value.high else f"{_short(measure, value.low)} to {_short(measure, value.high)}"
    mark = "● " if on_edge else ""
    return f"{mark}{_short(measure, value.mean)}" + (f'<span class="delta">{span}</span>' if span else "")


def headline(source: Contest, items: Sequence[Entry]) -> str:
    recipe = source.settings.get("recipe") or {}
    model = f'<span class="model">{text(short_name(str(recipe.get("model") or source.name)))}</span>'
    if not items:
        return f"No cell of the comparison of {model} is finished yet"
    measure = measures_of(items)[0]
    winners = []
    for keep in sorted({item.keep for item in items}, reverse=True):
        group = [(q.mean, item) for item in items if item.keep == keep and (q := item.quality(*measure)) is not None]
        if group:
            choose = max if measure[0] == "accuracy" else min
            winners.append(f"{text(choose(group, key=lambda pair: pair[0])[1].label)} at {keep:g}")
    return f"What {model} keeps under one budget: best is {', '.join(winners)}"


def impossible_part(source: Contest) -> str:
    said = {str(row["impossible"]): str(row.get("cell")) for row, _ in source.cells if row.get("impossible")}
    return listed([f"<code>{text(cell)}</code>: {text(reason)}" for reason, cell in said.items()]) if said else ""


def pareto_page(source: Contest) -> Page:
    """The page of one comparison folder, finished or not."""
    items, dense = entries(source), record(source.dense, "dense", dense=True, depth=0, method="dense")
    styles, bits = looks_of(items), source.dense_bits
    done = sum(run is not None and "evaluate" in run.stages for _, run in source.cells)
    page = Page(
        title=f"tensormix: {source.name}",
        eyebrow=f"Comparison <strong>{text(source.name)}</strong>, {done} of {len(source.cells)} cells finished",
        headline=headline(source, items),
        lead=f'<p class="lead">{text(_lead(source, items))}</p>',
    )
    figures = []
    if bits:
        cost = lambda i: None if i.bits is None else Spread(i.bits.mean / bits, i.bits.low / bits, i.bits.high / bits)  # noqa: E731
        figures.append(
            _figure(
                "pareto",
                "Quality against stored bits",
                items,
                styles,
                dense,
                cost,
                "stored bits, dense = 1",
                1.0,
                BITS_TEXT,
            )
        )
    for tokens in sorted({tokens for item in items for r in item.records for tokens in r.latency}):
        label = f"speed at {plural(tokens, 'token')}, dense = 1"
        speed = lambda i, t=tokens: i.speed(t)  # noqa: E731
        name = f"Quality against measured speed, {plural(tokens, 'token')}"
        figures.append(_figure(f"speed-{tokens}", name, items, styles, dense, speed, label, 1.0, SPEED_TEXT, -1))
    page.section("pareto-part", "Quality against cost", *figures[:1])
    page.section("table", "All cells", result_table(items, dense, bits) if items else '<p class="none">None yet.</p>')
    page.section("speed", "Quality against speed", *figures[1:])
    page.section("impossible", "Budgets that could not be met", impossible_part(source))
    page.section("notes", "How to read this", listed(common_notes([dense, *(r for i in items for r in i.records)])))
    page.section("settings", "Settings", settings_part(source.settings, f"{source.name}.json"))
    page.section("facts", "Seeds and times", facts_part(source, source.settings))
    page.section("environment", "Environment", environments_part(source))
    page.section("again", "Run it again", reproduce_part("compare", f"{source.name}.json"))
    return page


def _lead(source: Contest, items: Sequence[Entry]) -> str:
    nulls = sorted({METHODS.get(i.method, i.method) for i in items if i.null})
    seeds = len({row.get("seed") for row, _ in source.cells})
    words = f"Every method got the same budgets, calibration text and recovery; {plural(seeds, 'seed')}."
    if not nulls or not items:
        return words
    measure = measures_of(items)[0]
    losers = []
    for item in items:
        value = item.quality(*measure)
        rivals = [q.mean for i in items if i.null and i.keep == item.keep and (q := i.quality(*measure)) is not None]
        if not item.null and value is not None and rivals:
            best = max(rivals) if measure[0] == "accuracy" else min(rivals)
            if value.mean <= best if measure[0] == "accuracy" else value.mean >= best:
                losers.append(f"{item.label} at {item.keep:g}")
    against = f" Null baselines: {', '.join(nulls)}."
    return (
        words
        + against
        + (f" No better than the best of them: {', '.join(losers)}." if losers else " All methods beat them.")
    )
