"""Put a figure on the page so that nobody is left out: picture, table and text in one display bundle."""

from __future__ import annotations

import html
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

PLOTLY = "application/vnd.plotly.v1+json"


def show(fig: go.Figure, *, alt: str, table: pd.DataFrame, caption: str = "") -> None:
    """Display a figure with its alternative text and the same numbers as a table, in one bundle.

    The figure for whoever can draw it, an HTML table for pages and screen readers, plain text for terminals.
    Errors: no alternative text, an empty table: a picture alone is lost on some readers.
    """
    from IPython.display import display

    display(bundle(fig, alt=alt, table=table, caption=caption), raw=True)


def bundle(fig: go.Figure, *, alt: str, table: pd.DataFrame, caption: str = "") -> dict[str, Any]:
    """What `show` displays: MIME type -> content."""
    if not isinstance(alt, str) or not alt.strip():
        raise LabkitError("A figure needs alt, one or two sentences that say what it shows; give alt='…'.")
    if table is None or not len(table):
        raise LabkitError("A figure needs table, a data frame with the numbers it draws; an empty one was given.")
    spec = json.loads(fig.to_json())
    spec["layout"]["meta"] = {"alt": alt}
    spec["config"] = {"responsive": True, "displaylogo": False}
    return {
        PLOTLY: spec,
        "text/html": html_table(table, caption or alt),
        "text/plain": f"{alt}\n\n{table.to_string()}",
    }


def html_table(frame: pd.DataFrame, caption: str) -> str:
    """A data frame as an HTML table with a caption and scoped headers."""
    named = any(name is not None for name in frame.index.names)
    shown = frame.reset_index() if named else frame
    head = "".join(f"<th scope='col'>{html.escape(str(name))}</th>" for name in shown.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in shown.itertuples(index=False, name=None))
    caption = html.escape(caption)
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, (int, np.integer)):
        return f"<td style='text-align:right'>{value:,}</td>"
    if isinstance(value, (float, np.floating)):
        return f"<td style='text-align:right'>{'' if np.isnan(value) else f'{value:.5g}'}</td>"
    return f"<td>{html.escape('' if value is None else str(value))}</td>"
