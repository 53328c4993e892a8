"""The HTML report of a run: one page a lab, an index, and an `assets` folder. It loads nothing from elsewhere."""

from __future__ import annotations

import html
import json
import posixpath
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from labkit._files import size

ASSETS = Path(__file__).resolve().parents[1] / "data" / "report"
PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
STATIC_TWIN = "<p class='note'>An interactive panel: open the notebook to use it. What it shows stands just before.</p>"
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="stylesheet" href="assets/labkit.css">
<link rel="stylesheet" href="assets/code.css"></head>
<body><a class="skip" href="#main">Skip to the content</a><nav aria-label="Report">{nav}</nav>
<main id="main">
{body}
</main>
{scripts}</body></html>
"""
PAGE_SCRIPT = "<script src='assets/figures.js'></script>\n"
SCRIPTS = f"<script src='assets/plotly.min.js'></script>\n{PAGE_SCRIPT}"
LONG_NOTE = 400  # letters of a note that are shown at once: an engine's log may be pages long


def write_lab(folder: Path, record: Mapping[str, Any], pages: Mapping[str, str] | None = None) -> Path:
    """Write a lab's page from its executed notebook. `pages`: notebook path in the course -> page, for links."""
    write_assets(folder)
    executed = folder / record["executed"]
    body = _failures(record)
    body += notebook_html(executed) if executed.exists() else "<p>The lab ended before its first cell was saved.</p>"
    body = _relink(body, record["notebook"], pages or {})
    nav = f"<a href='index.html'>All labs of this run</a> | <a href='{record['executed']}'>this executed notebook</a>"
    page = folder / record["html"]
    scripts = SCRIPTS if "labkit-plotly" in body else PAGE_SCRIPT
    page.write_text(PAGE.format(title=html.escape(record["title"]), nav=nav, body=body, scripts=scripts), encoding="utf-8")
    return page


def notebook_html(executed: Path) -> str:
    """The cells and outputs of an executed notebook as HTML, without any page around them."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(executed, as_version=4)
    # papermill marks a failure with two cells of its own, one with an empty link; the page begins with a better one
    notebook.cells = [cell for cell in notebook.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        shown = [output for output in cell.get("outputs", []) if not _repeats_a_figure(output)]
        for output in shown:
            if "data" in output:
                _plain_output(output)
        if cell.cell_type == "code":
            cell.outputs = shown
    exporter = HTMLExporter(template_name="basic", embed_images=True)
    language = notebook.metadata.get("labkit", {}).get("language", "en").replace("_", "-")
    return f"<div lang='{language}'>{exporter.from_notebook_node(notebook)[0]}</div>"


def write_assets(folder: Path) -> None:
    """Style, script and plotly.js, once a folder."""
    assets = folder / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    for source in (*ASSETS.iterdir(), _plotly_js()):
        target = assets / source.name
        if not target.exists() or target.stat().st_size != source.stat().st_size:
            shutil.copyfile(source, target)
    code = assets / "code.css"
    if not code.exists():
        from pygments.formatters import HtmlFormatter

        code.write_text(HtmlFormatter().get_style_defs(".highlight"), encoding="utf-8")


def write_index(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write `index.html`: the headline table, the labs with status, time and memory, and the machine."""
    write_assets(folder)
    passed = sum(lab["status"] == "passed" for lab in results["labs"])
    body = [f"<h1>labkit report</h1><p>{passed} of {len(results['labs'])} labs passed, profile {results['profile']}.</p>"]
    if results["headline"]:
        body.append(_headline(results["headline"]))
    body.append(_lab_table(results["labs"], results["memory_method"]))
    body.append(_machine(results))
    page = folder / "index.html"
    page.write_text(PAGE.format(title="labkit report", nav="", body="\n".join(body), scripts=PAGE_SCRIPT), encoding="utf-8")
    return page


def _headline(rows: Sequence[Mapping[str, str]]) -> str:
    """The headline table; what its rows note stands numbered below, as a column of sentences would be an inch wide."""
    notes = list(dict.fromkeys(row["note"] for row in rows if row["note"]))
    shown = []
    for row in rows:
        mark = f" [{notes.index(row['note']) + 1}]" if row["note"] else ""
        shown.append({k: v for k, v in row.items() if k != "note"} | {"precision": row["precision"] + mark})
    below = "".join(f"<li>{_note(note)}</li>" for note in notes)
    caption = "The house model through every engine, measured on this machine"
    return table(shown, caption) + (f"<ol class='notes' aria-label='Notes'>{below}</ol>" if notes else "")


def _note(text: str) -> str:
    """A note; of a long one the beginning, and all of it on demand."""
    if len(text) <= LONG_NOTE:
        return html.escape(text)
    start = html.escape(text[:LONG_NOTE].rsplit(" ", 1)[0])
    return f"{start} …<details><summary>The whole note</summary><p>{html.escape(text)}</p></details>"


def table(rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    """Rows with the same keys as an HTML table with a caption."""
    head = "".join(f"<th scope='col'>{html.escape(key)}</th>" for key in rows[0])
    body = "".join(f"<tr>{''.join(_cell(value) for value in row.values())}</tr>" for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    text = html.escape(str(value))
    return f"<td class='number'>{text}</td>" if re.match(r"^[-+]?[\d.]", text) else f"<td>{text}</td>"


def _lab_table(labs: Sequence[Mapping[str, Any]], method: str) -> str:
    head = "".join(
        f"<th scope='col'>{name}</th>" for name in ("lab", "status", "time", "peak memory", "disk", "exercises", "failure")
    )
    rows = []
    for lab in labs:
        kind = "passed" if lab["status"] == "passed" else "bad"
        done = sum(state == "passed" for state in lab["exercises"].values())
        failure = "; ".join(_failure_link(lab, one) for one in lab["failed"])
        place = f" on {html.escape(lab['device'])}" if "device" in lab else ""
        rows.append(
            f"<tr><td><a href='{lab['html']}'>{html.escape(lab['title'])}</a>{place}</td>"
            f"<td class='status-{kind}'>{lab['status']}</td>"
            f"<td class='number'>{lab['seconds']:.1f} s</td><td class='number'>{size(lab['peak_bytes'])}</td>"
            f"<td class='number'>{size(lab['disk_bytes'])}</td>"
            f"<td>{done} of {len(lab['exercises'])} passed</td><td>{failure}</td></tr>"
        )
    caption = f"Labs of this run. Peak memory: {html.escape(method)}."
    head = f"<caption>{caption}</caption><thead><tr>{head}</tr></thead>"
    return f"<h2>Labs</h2><table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _failure_link(lab: Mapping[str, Any], failure: Mapping[str, Any]) -> str:
    text = html.escape(failure["signature"])
    return f"<a href='{lab['html']}#cell-id={failure['cell']}'>cell {failure['index']}</a>: {text}" if failure["cell"] else text


def _failures(record: Mapping[str, Any]) -> str:
    if not record["failed"]:
        return ""
    items = "".join(f"<li>{_failure_link(record, one)}<br>{html.escape(one['message'])}</li>" for one in record["failed"])
    return f"<section role='alert'><p class='status-bad'>This lab {record['status']}.</p><ul>{items}</ul></section>\n"


def _machine(results: Mapping[str, Any]) -> str:
    host = results["host"]
    rows = {
        "labkit": results["labkit"],
        "processor": f"{host.get('cpu')}, {host['cpus']} cores usable",
        "memory allowed": size(host["memory_limit_bytes"]),
        "system": f"{host.get('system')} {host.get('release')} {host.get('machine')}, Python {host.get('python')}",
        "packages": ", ".join(f"{k} {v}" for k, v in (host.get("versions") or {}).items()),
        "run": f"{results['started']} to {results['finished']}",
    }
    cells = "".join(f"<tr><th scope='row'>{k}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    more = "<p>Every figure of this page is in <a href='results.json'>results.json</a>.</p>"
    return f"<h2>Machine</h2><table>{cells}</table>{more}"


def _repeats_a_figure(output: Any) -> bool:
    """Whether this is the folded table `labkit.show` puts below a figure in notebooks: pages have the table already."""
    return "class='labkit-words'" in output.get("data", {}).get("text/html", "")


def _plain_output(output: Any) -> None:
    """Keep what HTML can show: figures become a place to draw plus their table; panels become a sentence."""
    data = output["data"]
    if PLOTLY in data:
        data["text/html"] = figure_html(data.pop(PLOTLY), data.get("text/html", ""), data.get("text/plain", ""))
    elif WIDGET in data:
        data["text/html"] = STATIC_TWIN
        del data[WIDGET]
    data.pop("application/javascript", None)


def figure_html(figure: Mapping[str, Any], twin: str, plain: str) -> str:
    """A figure drawn by the page's own script, with its alternative text, followed by its HTML twin (the table)."""
    alt = figure_alt(figure) or (str(plain).strip().splitlines() or [""])[0]
    spec = json.dumps({k: figure.get(k) for k in ("data", "layout", "config")}).replace("<", "\\u003c")
    drawn = f"<div class='plot' role='img' aria-label='{html.escape(alt, quote=True)}'></div>"
    return (
        f"<div class='labkit-figure'>{drawn}<script type='application/json' class='labkit-plotly'>{spec}</script>"
        f"{''.join(twin)}</div>"
    )


def figure_alt(figure: Mapping[str, Any]) -> str:
    """The alternative text `labkit.show` keeps with a figure; empty when there is none."""
    meta = (figure.get("layout") or {}).get("meta") or {}
    return meta.get("alt", "") if isinstance(meta, Mapping) else ""


def _relink(body: str, notebook: str, pages: Mapping[str, str]) -> str:
    """Links between notebooks become links between pages; a lab that is not in this run leads to the index."""

    def page(found: re.Match) -> str:
        target, anchor = found.group(1), found.group(2) or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(notebook), target))
        return f'href="{pages[path]}{anchor}"' if path in pages else 'href="index.html"'

    return re.sub(r'href="(?!https?:)([^"#]+\.ipynb)(#[^"]*)?"', page, body)


@cache
def _plotly_js() -> Path:
    import plotly

    return Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
