"""A real JupyterLab in a real Chromium, for the tests and the pictures: started on loopback, watched, and ended whole."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from labkit.course.watch import end

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "reports" / "browser"  # what the browser saw: kept by continuous integration, ignored by git
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WAIT = 60  # seconds for anything to appear that is not a model at work
RUN_WAIT = 240  # seconds for a whole lab to run
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def missing() -> str:
    """Why there is no browser test here, as one sentence; empty when there can be one."""
    if not all(map(importlib.util.find_spec, ("playwright", "axe_playwright_python"))):
        return 'Playwright or its axe package is not installed. Try:  pip install "labkit[test]"'
    if chromium() is None:
        return "Chromium was not found: install your system's package, or set LABKIT_CHROMIUM to its program."
    return ""


def chromium() -> str | None:
    """The browser's program: $LABKIT_CHROMIUM, else the system's."""
    return os.environ.get("LABKIT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def jupyter(folder: Path, home: Path) -> Iterator[str]:
    """A JupyterLab over `folder` with a token and settings of its own below `home`; yields its address.

    It and its kernels are gone afterwards, whatever happened.
    """
    token, port, own = secrets.token_hex(16), _free_port(), home / "jupyter"
    _no_news(own / "JUPYTER_CONFIG_DIR")
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    with open(own / "server.log", "wb") as log:
        server = psutil.Popen(command, env=_environment(home, own), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, own / "server.log")
            yield f"http://127.0.0.1:{port}/lab?token={token}"
        finally:
            end(server)


def _environment(home: Path, own: Path) -> dict[str, str]:
    """Nothing of the person's own Jupyter is read or written, and no thread of an engine spins."""
    ours = {name: str(own / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    ours |= {"IPYTHONDIR": str(own / "ipython"), "LABKIT_HOME": str(home), "OMP_WAIT_POLICY": "passive"}
    return {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "JPY"))} | ours | {"TQDM_DISABLE": "1"}


def _no_news(settings: Path) -> None:
    """Answer JupyterLab's first question, whether it may fetch news, with no: the box would lie over the notebook."""
    file = settings / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}), encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _wait_for(address: str, server: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start within {WAIT} s; its log ends: {log.read_text()[-1500:]}")


# --- the browser -------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What went wrong behind the page's back."""

    errors: list[str] = field(default_factory=list)  # console errors and uncaught exceptions
    foreign: list[str] = field(default_factory=list)  # addresses outside this machine that the page asked for


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium with a fresh profile: a playwright `Browser`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        one = play.chromium.launch(executable_path=chromium(), args=FLAGS, timeout=1e3 * WAIT)
        try:
            yield one
        finally:
            one.close()


def watched_page(browser: Any, width: int = 1280, height: int = 1400) -> tuple[Any, Seen]:
    """A new page that waits `WAIT` seconds at most for anything, and what it does that it should not."""
    page, seen = browser.new_context(viewport={"width": width, "height": height}).new_page(), Seen()
    page.set_default_timeout(1e3 * WAIT)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", lambda line: seen.errors.append(f"{line.text} ({line.location['url']})") if line.type == "error" else None)
    page.on("request", lambda request: None if _is_local(request.url) else seen.foreign.append(request.url))
    page.on("websocket", lambda socket: None if _is_local(socket.url) else seen.foreign.append(socket.url))
    return page, seen


def _is_local(url: str) -> bool:
    parts = urllib.parse.urlsplit(url.removeprefix("blob:"))
    return parts.scheme in ("file", "data", "about") or parts.hostname == "127.0.0.1"


class Notebook:
    """A notebook open in JupyterLab. Cells go by their ids in the file."""

    def __init__(self, page: Any, lab: str, file: Path):
        """`lab`: the address `jupyter` gave; `file`: a notebook right in its folder."""
        self.page = page
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        self.place = {cell["id"]: number for number, cell in enumerate(cells)}
        self.last = [cell["id"] for cell in cells if cell["cell_type"] == "code"][-1]
        page.goto(lab.replace("/lab?", f"/lab/workspaces/{file.stem}/tree/{file.name}?"))  # a workspace holds one notebook
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        self.cell(self.last).wait_for(state="attached")

    def cell(self, name: str) -> Any:
        return self.page.locator(f'.jp-Cell[data-windowed-list-index="{self.place[name]}"]')

    def output(self, name: str) -> Any:
        """The output area of a cell, scrolled into view."""
        area = self.cell(name).locator(".jp-Cell-outputArea")
        self.cell(name).scroll_into_view_if_needed()
        return area

    def run_all(self) -> None:
        """Choose Run All Cells in the menu and wait for the last cell."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.wait_for_run(self.last, RUN_WAIT)

    def run(self, name: str, source: str | None = None) -> None:
        """Run one cell with the keyboard as a learner does, after typing `source` into it if given."""
        self.cell(name).locator(".cm-content").click()
        if source is not None:
            self.page.keyboard.press("Control+A")
            self.page.keyboard.insert_text(source)
        before = self._prompt(name).text_content()
        self.page.keyboard.press("Control+Enter")
        self.page.wait_for_function(
            "([prompt, before]) => prompt.textContent !== before", arg=[self._prompt(name).element_handle(), before]
        )
        self.wait_for_run(name, WAIT)

    def wait_for_run(self, name: str, seconds: float) -> None:
        """Wait until the cell has a number, which it gets when it has ended."""
        self._prompt(name).filter(has_text=re.compile(r"\[\d+\]")).wait_for(state="attached", timeout=1e3 * seconds)

    def _prompt(self, name: str) -> Any:
        return self.cell(name).locator(".jp-InputArea-prompt").first


def picture(place: Any, name: str) -> None:
    """Keep a screenshot of a page or of a part of it as reports/browser/NAME.png."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    place.screenshot(path=PICTURES / f"{name}.png", timeout=1e3 * WAIT)


def violations(page: Any, within: str | None = None) -> list[str]:
    """What axe-core finds that is serious or critical, one line each. `within`: a CSS selector; the whole page without."""
    from axe_playwright_python.sync_playwright import Axe

    context = {"include": [[within]]} if within else None
    found = Axe().run(page, context=context, options={"preload": False}).response["violations"]
    return [
        f"{one['impact']}: {one['id']}: {node['html'][:160]}"
        for one in found if one["impact"] in ("serious", "critical") for node in one["nodes"]
    ]  # fmt: skip
