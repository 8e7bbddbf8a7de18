"""The page in a real browser: no error in its console, values on hover and by keyboard."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from report_folders import write_sweep

from tensormix.report import build_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --enable-logging=stderr --v=0").split()  # fmt: skip
PROBE = """<script>
const panel = document.querySelector("#accuracy svg.panel");
panel.focus();
panel.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
document.body.dataset.probe = document.getElementById("tip").textContent;
document.body.dataset.overflow = document.documentElement.scrollWidth > innerWidth;
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_page_in_a_browser(tmp_path: Path) -> None:
    path = build_report([write_sweep(tmp_path / "sweep", depths=(1, 2, 3))])
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,900", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert 'data-probe="dense model: accuracy' in done.stdout
    assert 'data-overflow="false"' in done.stdout
