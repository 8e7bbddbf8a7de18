"""The pages in a real browser (Debian's chromium through playwright): from disk, by pointer and keyboard, on a phone,
in the dark and on paper."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from real_pages import copied, set_boundary

from tensormix.report import build_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed (pip install -e '.[dev]')"),
]
PAGES = ("sweep", "run", "runs", "comparison")
NARROW = {"width": 390, "height": 844}  # a phone
SMALLEST = 11  # pixels of a letter, subscripts aside
Open = Callable[..., AbstractContextManager[Any]]

PROBES = Path(__file__).with_name("probes.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(
    real_sweep: Path, real_run: Path, real_comparison: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    sweep = copied(real_sweep, folder)
    set_boundary(sweep, value=3, last_good=2, low=3, high=4)  # a model of noise has none
    runs = [copied(real_run, folder), sweep / "last-01-mixt2", sweep / "last-03-mixt2"]
    return {
        "sweep": build_report([sweep]),
        "run": build_report(runs[:1], folder / "run.html"),
        "runs": build_report(runs, folder / "runs.html"),
        "comparison": build_report([copied(real_comparison, folder, at="comparison")]),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Open:
    """A page from disk; afterwards nothing may stand in its console and nothing may have been asked of a network."""

    @contextmanager
    def visit(name: str, **options: Any) -> Iterator[Any]:
        context = browser.new_context(reduced_motion="reduce", **options)
        context.set_default_timeout(10_000)
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[name].as_uri())
        page.evaluate(PROBES)
        try:
            yield page
        finally:
            context.close()
        assert not said
        assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]

    return visit


def open_details(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_has_data(opened: Open, name: str) -> None:
    with opened(name) as page:
        assert page.evaluate("probe.empty()") == []
        assert page.locator("figure").count() >= {"sweep": 12, "run": 8, "runs": 4, "comparison": 2}[name]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("probe.covered()") == []


def test_values_under_the_pointer(opened: Open) -> None:
    with opened("sweep") as page:
        page.locator("#accuracy").scroll_into_view_if_needed()
        mark, tip = page.locator("#accuracy svg.panel").first.locator("[data-tip]").last, page.locator("#tip")
        assert not tip.is_visible()
        mark.hover()
        assert (
            tip.is_visible() and "accuracy" in tip.inner_text() and tip.inner_text() == mark.get_attribute("data-tip")
        )
        page.mouse.move(2, 2)
        assert not tip.is_visible()


@pytest.mark.parametrize("name", PAGES)
def test_the_keyboard_reaches_every_control(opened: Open, name: str) -> None:
    """Tab visits all of them in the order of the page, and each shows that it has the focus."""
    with opened(name) as page:
        open_details(page)
        num_controls = page.evaluate("probe.watch()")
        for _ in range(num_controls):
            page.keyboard.press("Tab")
        assert page.evaluate("probe.seen.map(([place]) => place)") == list(range(num_controls))
        assert page.evaluate("probe.seen.filter(([place, outline]) => outline === 'none')") == []


def test_what_the_keys_do(opened: Open) -> None:
    with opened("sweep") as page:
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # "Skip to the results"
        assert page.url.endswith("#" + page.locator("main section").first.get_attribute("id"))
        assert page.evaluate("probe.silent()") == []
        panel, tip, said = page.locator("svg.panel").first, page.locator("#tip"), []
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
            panel.press(key)
            assert tip.is_visible()
            said.append(tip.inner_text())
        assert said[0] == said[2] != said[1]
        page.keyboard.press("Escape")
        assert not tip.is_visible()
        summary = page.locator("figure summary").first
        for is_open in (True, False):
            summary.press("Enter")
            assert page.locator("figure details").first.evaluate("(one) => one.open") == is_open


def lonely(marks: list[Any]) -> Any:
    """The mark that is furthest from its nearest neighbour: a finger can mean no other."""
    places = [(box["x"], box["y"]) for box in (mark.bounding_box() for mark in marks)]
    nearest = [
        min((abs(x - left) + abs(y - top) for other, (x, y) in enumerate(places) if other != number), default=0.0)
        for number, (left, top) in enumerate(places)
    ]
    return marks[nearest.index(max(nearest))]


@pytest.mark.parametrize("name", PAGES)
def test_on_a_phone(opened: Open, name: str) -> None:
    with opened(name, viewport=NARROW, device_scale_factor=2, is_mobile=True, has_touch=True) as page:
        open_details(page)
        assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [NARROW["width"]] * 2
        texts = page.evaluate("probe.texts()")
        assert len(texts) > 50
        assert [(text, size) for text, size, *_ in texts if size < SMALLEST] == []
        assert [text for text, _, left, right, scrolls in texts if not scrolls and (left < -1 or right > 391)] == []
        assert page.evaluate("probe.covered()") == []
        mark, tip = lonely(page.locator("svg.panel").first.locator("[data-tip]").all()), page.locator("#tip")
        mark.scroll_into_view_if_needed()
        at = mark.bounding_box()
        page.touchscreen.tap(at["x"] - 3, at["y"] - 3)  # a finger misses the mark, but not by much
        assert tip.inner_text() == mark.get_attribute("data-tip")
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= NARROW["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_ground(opened: Open, scheme: str) -> None:
    """WCAG AA: a contrast of at least 4.5."""
    with opened("sweep", color_scheme=scheme) as page:
        assert page.evaluate("probe.faint()") == []
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")


@pytest.mark.parametrize("name", ["sweep", "comparison"])
def test_on_paper(opened: Open, name: str) -> None:
    """Black on white at A4 width, with every figure and table and without what only a screen can use."""
    with opened(name, viewport={"width": 718, "height": 1000}, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        for useless in ("nav", "details", ".download"):
            assert not any(one.is_visible() for one in page.locator(useless).all()), useless
        assert all(one.is_visible() for one in page.locator("svg.panel").all())
        texts = page.evaluate("probe.texts()")
        assert [(text, size) for text, size, _, _, table in texts if not table and size < 9] == []
        assert page.pdf(format="A4")[:5] == b"%PDF-"
