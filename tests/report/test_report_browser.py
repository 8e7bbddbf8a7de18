"""The page in a real browser: no error in its console, data in every figure, values on hover and by keyboard."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from measured import measure_everything
from report_folders import fall, write_sweep

from tensormix.report import build_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --enable-logging=stderr --v=0").split()  # fmt: skip
PROBE = """<script>
const key = (panel, name) => panel.dispatchEvent(new KeyboardEvent("keydown", {key: name}));
const tip = document.getElementById("tip"), said = {}, silent = [], empty = [];
for (const figure of document.querySelectorAll("figure")) {
  for (const panel of figure.querySelectorAll("svg.panel")) {
    if (![...panel.querySelectorAll("[data-x]")].some((mark) => mark.getBoundingClientRect().width)) empty.push(figure.id);
    panel.focus();
    key(panel, "ArrowRight");
    if (document.activeElement !== panel || tip.hidden || !tip.textContent) silent.push(figure.id);
    said[figure.id] ??= tip.textContent;
    key(panel, "Escape");
    if (!tip.hidden) silent.push(figure.id);
  }
}
const point = document.querySelector("#accuracy svg.panel [data-x][data-tip]");
point.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
Object.assign(document.body.dataset, {
  probe: said["accuracy"], hover: tip.hidden ? "" : tip.textContent, silent: silent.join(" "), empty: empty.join(" "),
  figures: document.querySelectorAll("figure").length, width: innerWidth,
  overflow: document.documentElement.scrollWidth > innerWidth,
  small: Math.min(...[...document.querySelectorAll("figcaption, td, p")].map((e) => parseFloat(getComputedStyle(e).fontSize))),
  links: [...document.querySelectorAll("a[download]")].filter((a) => !a.href.startsWith("data:")).length,
  loaded: performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:")).length,
});
</script></body>"""  # noqa: E501


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_page_in_a_browser(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", depths=(1, 4, 8))
    measure_everything(folder, {f"mixt-last-{d}": (fall("mixt", "last", d), d) for d in (1, 4, 8)})
    path = build_report([folder])
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,900", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    body = re.findall(r"<body ([^>]*)>", done.stdout)[0]
    seen = dict(re.findall(r'data-(\w+)="([^"]*)"', body))
    assert seen["empty"] == seen["silent"] == "" and int(seen["figures"]) >= 16
    assert "dense model: accuracy" in seen["probe"] and "accuracy" in seen["hover"]
    assert seen["overflow"] == "false" and int(seen["width"]) <= 500
    assert float(seen["small"]) >= 12 and seen["links"] == seen["loaded"] == "0"
