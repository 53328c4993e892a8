"""The dashboard: real pages from a real ledger, served on this machine, ended cleanly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from test_charts import HOST, everything, taken

from labkit import cli, dashboard
from labkit.ledger import Ledger, ledger

REPO = Path(__file__).parents[1]
OTHER = HOST | {"cpu": "<b>another</b>"}


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    book = ledger(tmp_path / "ledger.jsonl")
    book.append(*everything(host=OTHER), *everything(), *everything("openvino"))
    return book


def figures(page: str) -> list[dict]:
    return [json.loads(found) for found in re.findall(r"class='labkit-plotly'>(.*?)</script>", page, re.S)]


def test_every_chart_with_its_text_and_table(book: Ledger):
    page = dashboard.page(book)
    drawn = figures(page)
    assert len(drawn) == len(dashboard.VIEWS) == page.count("class='plot' role='img' aria-label='")
    assert page.count("<table>") == 1 + len(drawn) and page.count("<caption>") == 1 + len(drawn)
    assert re.search(r"Perplexity of 8 artifacts: from 5\.?\d* \(\w+ f16\) to 4\d\.?\d* \(\w+ tq2_0\)\.", page)
    speeds = [figure for figure in drawn if "tokens/s" in json.dumps(figure["layout"]["yaxis"])]
    assert {trace["name"] for trace in speeds[0]["data"]} == {"llamacpp", "openvino"}


def test_nothing_comes_from_elsewhere(book: Ledger):
    linked = re.findall(r"(?:src|href)=['\"]([^'\"]*)['\"]", dashboard.page(book))
    assert linked and all(link in ("", "#main") or link.startswith("assets/") for link in linked)


def test_the_choice_of_machine(book: Ledger):
    page = dashboard.page(book)
    assert "<b>another" not in page and "cpu &lt;b&gt;another&lt;/b&gt;" in page  # offered, and escaped
    shown = dashboard.page(book, {"machine": dashboard._machine(OTHER)})
    assert "Decode speed of 4 artifacts" in shown and "Decode speed of 8 artifacts" in page
    assert "Perplexity of 8 artifacts" in shown  # quality is the same on every machine
    assert dashboard.page(book, {"machine": "no such"}) == page


def test_an_empty_ledger_says_what_to_do(tmp_path: Path):
    page = dashboard.page(ledger(tmp_path / "none.jsonl"))
    assert "The ledger is empty" in page and figures(page) == []


def test_what_was_measured_otherwise_is_named(book: Ledger):
    about = {"workload": {"settings": {}, "window": 64}}
    book.append(taken("perplexity", "mlx", "q8_0", 8.5, [1.6, 1.7], {"counts": [9, 9]}, **about))
    assert "<p class='note'>Left out of perplexity, as measured on another workload: mlx q8_0.</p>" in dashboard.page(book)


def test_what_is_not_measured_is_not_drawn(tmp_path: Path):
    book = ledger(tmp_path / "ledger.jsonl")
    book.append(*(one for one in everything() if one.metric == "size"))
    page = dashboard.page(book)
    assert figures(page) == [] and page.count("<td>llamacpp</td>") == 4


@pytest.fixture
def url(book: Ledger):
    with dashboard.server(book, port=0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def get(url: str) -> tuple[int, str]:
    try:
        with urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def test_it_answers_and_reads_the_ledger_anew(url: str, book: Ledger):
    status, page = get(url + "/")
    assert status == 200 and "Perplexity of 8 artifacts" in page
    book.append(*everything("mlx"))
    assert "Perplexity of 12 artifacts" in get(url + "/")[1]
    assert "Decode speed of 4 artifacts" in get(f"{url}/?machine={quote(dashboard._machine(OTHER))}")[1]
    for asset in re.findall(r"assets/[\w.]+", page):
        assert get(f"{url}/{asset}")[0] == 200


def test_it_gives_out_nothing_else(url: str):
    assert get(url + "/favicon.ico") == (204, "")
    for path in ("/ledger.jsonl", "/assets/", "/assets/../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/etc/passwd"):
        assert get(url + path)[0] == 404


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without letting it say goodbye.")
@pytest.mark.parametrize(("end", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_program_ends_cleanly(book: Ledger, tmp_path: Path, end: int, status: int):
    env = {**os.environ, "PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "labkit", "serve-dashboard", "--ledger", str(book.path), "--port", "0", "--json"]
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = json.loads(child.stdout.readline())["url"]
    assert get(address)[0] == 200 and list(tmp_path.glob("labkit-dashboard-*"))
    child.send_signal(end)
    _, complaint = child.communicate(timeout=20)
    assert child.returncode == status and "Traceback" not in complaint
    assert not list(tmp_path.glob("labkit-dashboard-*"))


def test_a_port_in_use_is_one_sentence(book: Ledger, capsys, tmp_path: Path):
    with dashboard.server(book, port=0) as running:
        given = ["serve-dashboard", "--ledger", str(book.path), "--port", str(running.server_port)]
        assert cli.main(given) == 2
        assert f"Cannot serve on 127.0.0.1:{running.server_port}" in capsys.readouterr().err
    assert cli.main(["serve-dashboard", "--ledger", str(tmp_path / "none")]) == 2
