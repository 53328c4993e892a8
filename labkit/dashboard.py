"""The ledger as one page for showing in class: `labkit serve-dashboard`, a small server on this machine only.

Every load of the page reads the ledger again, so a measurement taken a moment ago is there. The page is plain HTML with
the report's style and script: it works with a keyboard, prints, and loads nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
import tempfile
import threading
import warnings
import webbrowser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from labkit.ledger import HOST_BOUND, HOST_KEYS, Ledger, ledger
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd

# metric -> the chart of `labkit.charts` that draws it and what it is asked, in the order of the page
VIEWS: dict[str, tuple[str, dict[str, Any]]] = {
    "perplexity": ("size_against_perplexity", {}),
    "divergence": ("bits_against_divergence", {}),
    "accuracy": ("ladder", {"metrics": ["accuracy"]}),
    "speed": ("decode_speed", {}),
    "memory": ("memory_bars", {}),
    "roofline": ("roofline", {}),
}


def page(book: Ledger, asked: Mapping[str, str] | None = None) -> str:
    """The whole page. `asked` chooses `checkpoint` and `machine`; left out, those of the newest measurement."""
    from labkit.course.report import PAGE, SCRIPTS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged lines of the ledger are told where measuring happens
        frame = book.frame()
    if not len(frame):
        body = "<p role='status'>The ledger is empty. Measure something: <code>labkit run</code> fills it.</p>"
    else:
        # what belongs to a machine is shown for one machine; size and quality are the same on all
        bound = frame["metric"].isin(HOST_BOUND)
        machines = [_machine(host) if own else "" for host, own in zip(frame["host"], bound, strict=True)]
        body = _body(frame.assign(machine=machines), asked or {})
    body = f"<h1>What was measured</h1>{body}"
    scripts = SCRIPTS if "labkit-plotly" in body else ""
    nav = f"<a href=''>Read the ledger again</a> | {html.escape(str(book.path))}"
    return PAGE.format(title="labkit: what was measured", nav=nav, body=body, scripts=scripts)


def _body(frame: pd.DataFrame, asked: Mapping[str, str]) -> str:
    from labkit import charts

    chosen = {name: _choice(frame, name, asked.get(name)) for name in ("checkpoint", "machine")}
    shown = frame[(frame["checkpoint"] == chosen["checkpoint"]) & frame["machine"].isin(["", chosen["machine"]])]
    if not len(shown):
        return f"{_form(frame, chosen)}<p role='status'>Nothing was measured on this model on this machine.</p>"
    where = f" on {chosen['machine']}" if chosen["machine"] else ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        table = charts.headline(shown)
    head = charts.html_table(table, f"{chosen['checkpoint']}{where}; what was not measured stays empty")
    notes = [f"<p class='note'>{html.escape(str(one.message))}</p>" for one in said]
    figures = [_figure(shown, metric) for metric in VIEWS if (shown["metric"] == metric).any()]
    return "\n".join([_form(frame, chosen), f"<h2>In one table</h2>{head}", *notes, *figures])


def _figure(frame: pd.DataFrame, metric: str) -> str:
    """One chart with its text and table; a sentence in its place when it cannot be drawn."""
    from labkit import charts
    from labkit.course.report import PLOTLY, figure_html
    from labkit.measure import METRICS

    title, (chart, options) = METRICS[metric].title, VIEWS[metric]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is left out is said under the first table
            rows = charts.points(frame, metric)
            figure = getattr(charts, chart)(frame, **options)
    except LabkitError as error:
        return f"<h2>{html.escape(title)}</h2><p role='status'>{html.escape(str(error))}</p>"
    numbers = rows[["engine", "label", "bits_per_weight", "value", "low", "high"]]
    numbers = numbers.rename(columns={"label": "precision", "bits_per_weight": "bits per weight"})
    shown = charts.bundle(figure, alt=_sentence(title, METRICS[metric].unit, rows), table=numbers)
    return f"<h2>{html.escape(title)}</h2>{figure_html(shown[PLOTLY], shown['text/html'], shown['text/plain'])}"


def _sentence(title: str, unit: str, rows: pd.DataFrame) -> str:
    def said(row: pd.Series) -> str:
        number = f"{row['value']:.1%}" if unit == "share" else f"{row['value']:.4g} {unit}".rstrip()
        return f"{number} ({row['engine']} {row['label']})"

    least, most = rows.loc[rows["value"].idxmin()], rows.loc[rows["value"].idxmax()]
    return f"{title} of {len(rows)} artifacts: from {said(least)} to {said(most)}."


# --- choosing ----------------------------------------------------------------------------------------------------


def _machine(host: Mapping[str, Any]) -> str:
    """What makes two machines unlike for the ledger, in words."""
    return ", ".join(f"{key.replace('_', ' ')} {host.get(key)}" for key in HOST_KEYS if host.get(key) is not None)


def _choice(frame: pd.DataFrame, name: str, asked: str | None) -> str:
    """What was asked for if it is there, else the newest; empty where no row has any."""
    there = [value for value in frame[name] if value]
    return asked if asked in there else (there or [""])[-1]


def _form(frame: pd.DataFrame, chosen: Mapping[str, str]) -> str:
    """A drop-down for each thing there is a choice of, and a button: no script needed."""
    fields = []
    for name, value in chosen.items():
        if not value:
            continue
        options = "".join(
            f"<option{' selected' if one == value else ''}>{html.escape(one)}</option>" for one in sorted(set(frame[name]) - {""})
        )
        fields.append(f"<label>{name} <select name='{name}'>{options}</select></label>")
    return f"<form method='get'>{' '.join(fields)} <button>Show</button></form>"


# --- serving -----------------------------------------------------------------------------------------------------


class _Handler(SimpleHTTPRequestHandler):
    """The page at /, its style and scripts below /assets/, nothing else."""

    one_page = threading.Lock()  # warnings are caught for the whole process, so pages are made one after another

    def __init__(self, *given: Any, book: Ledger, **more: Any):
        self.book = book
        super().__init__(*given, **more)

    def do_GET(self) -> None:
        where = urlsplit(self.path)
        if where.path.startswith("/assets/"):
            return super().do_GET()
        if where.path == "/favicon.ico":  # browsers ask for one by themselves
            self.send_response(204)
            return self.end_headers()
        if where.path != "/":
            return self.send_error(404, "There is one page here: /")
        asked = {name: values[-1] for name, values in parse_qs(where.query).items()}
        with self.one_page:
            data = page(self.book, asked).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def list_directory(self, path: Any) -> None:
        self.send_error(404, "There is one page here: /")

    def log_message(self, format: str, *values: Any) -> None:
        """A class needs no list of requests."""


@contextmanager
def server(book: Ledger, host: str = "127.0.0.1", port: int = 8799) -> Iterator[ThreadingHTTPServer]:
    """A server for the page, not yet answering: call its `serve_forever`. Port 0 takes a free one."""
    from labkit.course.report import write_assets

    with tempfile.TemporaryDirectory(prefix="labkit-dashboard-") as folder:
        write_assets(Path(folder))
        try:
            found = ThreadingHTTPServer((host, port), partial(_Handler, book=book, directory=folder))
        except (OSError, OverflowError) as error:
            raise LabkitError(f"Cannot serve on {host}:{port} ({error}); give another --port, or 0 for a free one.") from None
        with found:
            yield found


def options(one: argparse.ArgumentParser) -> None:
    one.add_argument("--port", type=int, default=8799, help="0 takes a free one (default: %(default)s)")
    one.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    one.add_argument("--ledger", type=Path, metavar="FILE", help="another ledger than the one in labkit's home")
    one.add_argument("--open", action="store_true", help="show it in a browser")
    one.add_argument("--json", action="store_true")


def command(chosen: argparse.Namespace) -> int:
    """Show the ledger's figures as a page, for class, until Ctrl-C."""
    if chosen.ledger and not chosen.ledger.is_file():
        raise LabkitError(f"There is no ledger at {chosen.ledger}; expected a .jsonl file that labkit wrote.")
    with server(ledger(chosen.ledger), chosen.host, chosen.port) as running:
        url = f"http://{chosen.host}:{running.server_port}/"
        print(json.dumps({"url": url}) if chosen.json else f"{url}  (Ctrl-C ends it)", flush=True)
        if chosen.open:
            webbrowser.open(url)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
    return 0
