"""What a grading leaves behind: `grades.csv`, one page a learner, and the cohort's page. Nothing in them is executed."""

from __future__ import annotations

import csv
import hashlib
import html
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit._files import PARTIAL, size
from labkit.course.report import PAGE, table, write_assets


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write every file but `results.json`; pages of learners of an earlier grading are removed."""
    write_assets(folder)
    pages = {one["learner"]: page_name(one["learner"]) for one in results["learners"]}
    (folder / "learners").mkdir(exist_ok=True)
    for old in (folder / "learners").glob("*.html"):
        if f"learners/{old.name}" not in pages.values():
            old.unlink()
    for one in results["learners"]:
        _write_page(folder / pages[one["learner"]], f"Grades of {one['learner']}", _learner(one, results), "../")
    _write_page(folder / "index.html", "labkit grades", _cohort(results, pages), "")
    _write_csv(folder / "grades.csv", results)


def page_name(learner: str) -> str:
    """The learner's page, whatever characters the id has; two ids never share one."""
    plain = re.sub(r"[^A-Za-z0-9-]+", "_", learner)[:40]
    mark = "" if plain == learner.lower() else "-" + hashlib.sha256(learner.encode()).hexdigest()[:8]
    return f"learners/{plain}{mark}.html"


def _write_csv(path: Path, results: Mapping[str, Any]) -> None:
    """One row a learner: points, percent, then each exercise as 1 or 0, then what was noted."""
    names = list(results["cohort"]["exercises"])
    partial = path.with_name(PARTIAL + path.name)
    with open(partial, "w", newline="", encoding="utf-8-sig") as file:  # the mark makes spreadsheets read UTF-8
        rows = csv.writer(file)
        rows.writerow(["learner", "points", "of", "percent", *names, "status", "notes"])
        for one in results["learners"]:
            states = {name: e["state"] for lab in one["labs"] for name, e in lab["exercises"].items()}
            percent = f"{100 * one['points'] / one['of']:.1f}" if one["of"] else ""
            status = "; ".join(dict.fromkeys(lab["status"] for lab in one["labs"]))
            notes = " ".join(note for lab in one["labs"] for note in lab["notes"])
            marks = [int(states.get(name) == "passed") for name in names]
            rows.writerow([_cell(one["learner"]), one["points"], one["of"], percent, *marks, status, _cell(notes)])
    os.replace(partial, path)


def _cell(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return "'" + text if text[:1] in "=+-@\t\r" and text else text


def _write_page(path: Path, title: str, body: str, up: str) -> None:
    text = PAGE.format(title=html.escape(title), nav=_nav(up), body=body, scripts="")
    partial = path.with_name(PARTIAL + path.name)
    partial.write_text(text.replace('href="assets/', f'href="{up}assets/'), encoding="utf-8", errors="replace")
    os.replace(partial, path)


def _nav(up: str) -> str:
    return f"<a href='{up}index.html'>All learners</a> | <a href='{up}grades.csv'>grades.csv</a>"


def _cohort(results: Mapping[str, Any], pages: Mapping[str, str]) -> str:
    cohort = results["cohort"]
    body = [f"<h1>Grades</h1><p>{cohort['learners']} learners; median {cohort['median']:g} and mean {cohort['mean']:.1f} of"]
    body.append(f"{cohort['of']} points. Labs: {', '.join(html.escape(lab['title']) for lab in results['labs'])}.</p>")
    body += [f"<p role='alert'><strong>Note:</strong> {html.escape(text)}</p>" for text in results["warnings"]]
    counts = [{"exercise": name, **states} for name, states in cohort["exercises"].items()]
    body.append(table(counts, "How many learners are where with each exercise"))
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("learner", "points", "status", "time", "peak memory", "notes"))
    rows = "".join(_row(one, pages[one["learner"]]) for one in results["learners"])
    body.append(f"<h2>Learners</h2><table><caption>Points by learner</caption><thead><tr>{head}</tr></thead>")
    body.append(f"<tbody>{rows}</tbody></table>")
    body.append("<p>Every figure of this page is in <a href='results.json'>results.json</a>.</p>")
    return "\n".join(body)


def _row(one: Mapping[str, Any], page: str) -> str:
    status = "; ".join(dict.fromkeys(lab["status"] for lab in one["labs"]))
    notes = " ".join(note for lab in one["labs"] for note in lab["notes"])
    seconds, peak = sum(lab["seconds"] for lab in one["labs"]), max(lab["peak_bytes"] for lab in one["labs"])
    kind = "passed" if status == "graded" else "bad"
    return (
        f"<tr><td><a href='{page}'>{html.escape(one['learner'])}</a></td>"
        f"<td class='number'>{one['points']} of {one['of']}</td><td class='status-{kind}'>{html.escape(status)}</td>"
        f"<td class='number'>{seconds:.1f} s</td><td class='number'>{size(peak)}</td><td>{html.escape(notes)}</td></tr>"
    )


def _learner(one: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    body = [f"<h1>{html.escape(one['learner'])}: {one['points']} of {one['of']} points</h1>"]
    for lab in one["labs"]:
        body.append(f"<h2>{html.escape(lab['title'])}</h2><p>{lab['points']} of {lab['of']} points, {lab['status']}.</p>")
        body += [f"<p class='note'>{html.escape(note)}</p>" for note in lab["notes"]]
        if lab["exercises"]:
            rows = [{"exercise": name, **verdict} for name, verdict in lab["exercises"].items()]
            body.append(table(rows, "Verdicts, made by the course's own checks outside the learner's process"))
        body.append(_cells(lab["cells"]))
    shut = [wall for wall, stands in results["walls"].items() if stands]
    body.append(
        f"<p class='note'>Graded on {results['when']} with labkit {results['labkit']}; walls: {', '.join(shut) or 'none'}."
    )
    body.append(" ".join(map(html.escape, results["warnings"])) + "</p>")
    return "\n".join(body)


def _cells(cells: Sequence[Mapping[str, Any]]) -> str:
    """The code that ran and what it printed, as text: what a learner's notebook displays is never put into the page."""
    parts = []
    for cell in cells:
        parts.append(f"<div class='input_area'><pre>{html.escape(cell['source'][:20_000])}</pre></div>")
        if cell["said"]:
            kind = "output_error" if cell["error"] else "output_text"
            parts.append(f"<div class='{kind}'><pre>{html.escape(cell['said'])}</pre></div>")
        elif cell["message"]:
            parts.append(f"<div class='output_error'><pre>{html.escape(cell['message'])}</pre></div>")
    return f"<details><summary>The notebook as it was run ({len(cells)} code cells)</summary>{''.join(parts)}</details>"
