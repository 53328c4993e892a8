"""Put a figure on the page so that nobody is left out: picture, table and text in one display bundle."""

from __future__ import annotations

import html
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.i18n import tr
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

PLOTLY = "application/vnd.plotly.v1+json"
# No button that uploads the figure to plotly's cloud, and no ten stops of the Tab key beside every figure.
CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False, "showSendToCloud": False}
# Okabe and Ito's colours, which colour-blind readers tell apart, in the order that takes the place of plotly's own.
SAFE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#0072B2", "#E69F00")


def show(fig: go.Figure, *, alt: str, table: pd.DataFrame, caption: str = "") -> None:
    """Display a figure with its alternative text and the same numbers as a table.

    One bundle holds the figure for whoever can draw it, an HTML table for pages, plain text for terminals. A notebook
    shows only the first of these, so words and table follow below the figure, folded, for screen readers and the curious.
    Errors: no alternative text, an empty table: a picture alone is lost on some readers.
    """
    from IPython.display import display

    shown = bundle(fig, alt=alt, table=table, caption=caption)
    display(shown, raw=True)
    title = html.escape(tr("The figure in words and numbers"))
    words = f"<details class='labkit-words'><summary>{title}</summary>{shown['text/html']}</details>"
    display({"text/html": words, "text/plain": ""}, raw=True)


def bundle(fig: go.Figure, *, alt: str, table: pd.DataFrame, caption: str = "") -> dict[str, Any]:
    """What `show` displays: MIME type -> content."""
    if not isinstance(alt, str) or not alt.strip():
        raise LabkitError(tr("A figure needs alt, one or two sentences that say what it shows; give alt='…'."))
    if table is None or not len(table):
        raise LabkitError(tr("A figure needs table, a data frame with the numbers it draws; an empty one was given."))
    spec = json.loads(_safe_colours(fig.to_json()))
    spec["layout"]["meta"] = {"alt": alt}
    spec["config"] = dict(CONFIG)
    return {
        PLOTLY: spec,
        "text/html": html_table(table, caption or alt),
        "text/plain": f"{alt}\n\n{table.to_string()}",
    }


def _safe_colours(spec: str) -> str:
    """Plotly's own colours, which some readers cannot tell apart, become ours; a colour chosen by hand stays."""
    from plotly.colors import qualitative

    ours = dict(zip(map(str.lower, qualitative.Plotly), SAFE, strict=True))
    return re.sub("|".join(ours), lambda found: ours[found.group().lower()], spec, flags=re.IGNORECASE)


def html_table(frame: pd.DataFrame, caption: str) -> str:
    """A data frame as an HTML table with a caption and scoped headers; an index that says something becomes row headers."""
    from pandas.api.types import is_integer_dtype

    named = any(name is not None for name in frame.index.names)
    levels = frame.index.names if named or not is_integer_dtype(frame.index.dtype) else []
    head = "".join("<td></td>" if name is None else _header(name) for name in levels) + "".join(map(_header, frame.columns))
    body = "".join(
        f"<tr>{_row_headers(key) if levels else ''}{''.join(map(_cell, row))}</tr>"
        for key, row in zip(frame.index, frame.itertuples(index=False, name=None), strict=True)
    )
    caption = html.escape(caption)
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _header(name: Any) -> str:
    return f"<th scope='col'>{html.escape(str(name))}</th>"


def _row_headers(key: Any) -> str:
    return "".join(f"<th scope='row'>{_text(part)}</th>" for part in (key if isinstance(key, tuple) else (key,)))


def _cell(value: Any) -> str:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return f"<td style='text-align:right'>{_text(value)}</td>" if number else f"<td>{_text(value)}</td>"


def _text(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return tr("yes") if value else tr("no")
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else f"{value:.5g}"
    return html.escape("" if value is None else str(value))
