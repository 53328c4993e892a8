"""Panels: core ipywidgets around the charts. Only the panel modules know widgets.

A panel redraws a plain figure into an Output; it never holds state that a later cell needs. Each has a static twin
(`…_view`) that the cell before calls plainly: reports, papermill and screen readers see that one.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit import i18n, matrixchart
from labkit.i18n import noop, tr, trn
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd

    from labkit.course.quizzes import Question, Quiz

STATUS = "<p role='status' aria-live='polite'>{}</p>"
LADDER_METRICS = ("perplexity", "divergence", "accuracy")
WIDE = {"description_width": "11em"}
SCRIPT = Path(__file__).parent / "data" / "panel.js"
RUNG = (noop("size MB"), noop("bits per weight"), noop("perplexity"), noop("KL nats"), noop("task accuracy"))  # columns


# --- the interface -----------------------------------------------------------------------------------------------


def language(changed: Callable[[], None]) -> Any:
    """A choice of the interface's language, kept for every lab; `changed()` is called once it holds."""
    import ipywidgets as w

    options = [(title, code) for code, title in i18n.LANGUAGES.items()]
    choice = w.Dropdown(options=options, value=i18n.language(), **described("Language / Idioma"))
    said = w.HTML(STATUS.format(""))

    def keep(_: object) -> None:
        i18n.choose(choice.value)
        changed()
        said.value = STATUS.format(html.escape(tr("labkit speaks English from now on; run a cell again to read it so.")))

    choice.observe(keep, names="value")
    return panel(choice, said)


def panel(*parts: Any) -> Any:
    """The parts of a panel in a column, with the script that opens it to keyboards and screen readers."""
    import ipywidgets as w

    script = {"output_type": "display_data", "data": {"application/javascript": _script()}, "metadata": {}}
    return w.VBox([*parts, w.Output(outputs=(script,))]).add_class("labkit-panel")


@cache
def _script() -> str:
    return SCRIPT.read_text(encoding="utf-8")


def described(description: str) -> dict[str, Any]:
    """What all controls have in common; without a tooltip, ipywidgets would show the word "null" there."""
    layout = {"width": "36em", "max_width": "98%"}
    return {"description": description, "tooltip": description, "style": WIDE, "layout": layout}


# --- one matrix --------------------------------------------------------------------------------------------------


def matrix_view(weights: Any, bits: int | str = 4, per: str = "group", group: int = 32, scheme: str = "symmetric") -> None:
    """Show one weight matrix at one precision: histogram, levels, bits per weight and error. Parameters as `matrix`."""
    import plotly.graph_objects as go

    from labkit import charts

    spec, table, said = matrixchart.picture(matrixchart.matrix(weights), bits, per, group, scheme)
    charts.show(go.Figure(spec), alt=said, table=table)


def matrix(weights: Any, bits: int | str = 4, per: str = "group", group: int = 32, scheme: str = "symmetric") -> Any:
    """The same with sliders. `weights`: a matrix or a checkpoint's tensor view; `bits`: 1 to 8 or "ternary";
    `per`: what shares a scale, "tensor", "channel" or "group" (of `group` weights); `scheme`: "symmetric" or "affine".
    """
    import ipywidgets as w

    drawn = matrixchart.matrix(weights)
    matrixchart.quantize(drawn.weights[:1], bits, per, group, scheme)  # refuse a bad start value now, in one sentence
    steps = matrixchart.PRECISIONS if str(bits) in matrixchart.PRECISIONS else (str(bits), *matrixchart.PRECISIONS)
    groups = sorted({*(g for g in matrixchart.GROUPS if drawn.weights.shape[1] % g == 0), *([group] if per == "group" else [])})
    precision = w.SelectionSlider(options=named(steps), value=str(bits), **described(tr("bits a code")))
    grain = w.Dropdown(options=named(matrixchart.GRAINS), value=per, **described(tr("one scale per")))
    size = w.SelectionSlider(options=groups, value=group if group in groups else groups[0], **described(tr("group size")))
    kind = w.Dropdown(options=named(matrixchart.SCHEMES), value=scheme, **described(tr("scheme")))
    place, said = w.Output(), w.HTML()

    def draw(_: object = None) -> None:
        size.disabled, kind.disabled = grain.value != "group", precision.value == "ternary"
        spec, table, sentence = matrixchart.picture(drawn, precision.value, grain.value, size.value, kind.value)
        redraw(place, said, spec, sentence, table)

    for control in (precision, grain, size, kind):
        control.observe(draw, names="value")
    draw()
    return panel(precision, grain, size, kind, place, said)


def named(values: Iterable[str]) -> list[tuple[str, str]]:
    """Options as (what is shown, value)."""
    return [(tr(value), value) for value in values]


# --- the whole model ---------------------------------------------------------------------------------------------


def ladder_view(frame: pd.DataFrame, precision: str | None = None) -> None:
    """Show every rung of a ledger frame: a figure over bits per weight, and all figures as a table."""
    from labkit import charts

    rungs = _rungs(frame)
    _start(rungs, precision)
    charts.show(_ladder_figure(frame), alt=_ladder_sentence(rungs), table=_ladder_table(rungs))


def ladder(frame: pd.DataFrame, ask: Callable[[str], str], precision: str | None = None) -> Any:
    """A slider over the built precisions of a whole model, with size, quality and a live reply.

    `frame`: a ledger frame (newest rows count). `ask(precision)` gives the reply of that rung; with several engines
    in the frame it is called with "engine precision". It is called when the slider is let go.
    """
    import ipywidgets as w

    rungs = _rungs(frame)
    base = json.loads(_ladder_figure(frame).to_json())
    slider = w.SelectionSlider(
        options=list(rungs), value=_start(rungs, precision), continuous_update=False, **described(tr("precision"))
    )
    place, said, reply = w.Output(), w.HTML(), w.HTML()

    def draw(_: object = None) -> None:
        name = slider.value
        about = _ladder_table({name: rungs[name]})
        redraw(place, said, _marked(base, rungs[name]["bits per weight"]), f"{name}: {_figures(rungs[name])}", about)
        reply.value = STATUS.format(html.escape(tr("{name} is answering.", name=name)))
        reply.value = STATUS.format(_answer(ask, name))

    slider.observe(draw, names="value")
    draw()
    return panel(slider, reply, said, place)


def _answer(ask: Callable[[str], str], name: str) -> str:
    start = time.perf_counter()
    try:
        text = str(ask(name))
    except LabkitError as error:  # an engine that is not there must not break the slider
        return f"<strong>{html.escape(tr('No reply from {name}:', name=name))}</strong> {html.escape(str(error))}"
    took = time.perf_counter() - start
    said = html.escape(tr("{name} answers in {seconds:.2f} s:", name=name, seconds=took))
    return f"<strong>{said}</strong> <code>{html.escape(text)}</code>"


def _rungs(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Name -> size, bits and metrics of each artifact in the frame, most bits first."""
    from labkit import charts

    table = charts.headline(frame)
    several = table["engine"].nunique() > 1
    rows = sorted(table.to_dict("records"), key=lambda row: -row["bits per weight"])
    return {f"{row['engine']} {row['precision']}" if several else row["precision"]: row for row in rows}


def _start(rungs: Mapping[str, Any], precision: str | None) -> str:
    if precision is not None and precision not in rungs:
        known = ", ".join(rungs)
        raise LabkitError(tr("The frame has no precision {precision!r}; it has {known}.", precision=precision, known=known))
    return precision or next(iter(rungs))


def _ladder_figure(frame: pd.DataFrame) -> Any:
    from labkit import charts

    there = [metric for metric in LADDER_METRICS if (frame["metric"] == metric).any()]
    if not there:
        known = ", ".join(LADDER_METRICS)
        raise LabkitError(tr("The frame has none of {known}; measure one of them first.", known=known))
    return charts.ladder(frame, there)


def _marked(base: dict[str, Any], bits: float) -> dict[str, Any]:
    """The figure with a dotted line at `bits` through all its rows."""
    line = {"type": "line", "xref": "x", "yref": "paper", "x0": bits, "x1": bits, "y0": 0, "y1": 1}
    style = {"line": {"color": "#000000", "width": 2, "dash": "dot"}}
    return base | {"layout": base["layout"] | {"shapes": [line | style]}}


def _ladder_table(rungs: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([{tr("precision"): name, **{tr(key): row[key] for key in RUNG}} for name, row in rungs.items()])


def _ladder_sentence(rungs: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(rungs)
    ends = " ".join(f"{name}: {_figures(rungs[name])}." for name in dict.fromkeys([names[0], names[-1]]))
    return trn("{n} precision over bits per weight.", "{n} precisions over bits per weight.", len(names)) + " " + ends


def _figures(row: Mapping[str, Any]) -> str:
    parts = [f"{row['size MB']:.2f} MB", tr("{bits:.2f} bits per weight", bits=row["bits per weight"])]
    for key, form in (
        ("perplexity", noop("perplexity {value:.3f}")),
        ("KL nats", noop("KL {value:.5f} nats")),
        ("task accuracy", noop("accuracy {value:.1%}")),
    ):
        parts += [tr(form, value=row[key])] if row[key] == row[key] else []  # NaN: not measured
    return ", ".join(parts)


def redraw(place: Any, said: Any, spec: dict[str, Any], sentence: str, table: pd.DataFrame) -> None:
    """Replace the figure in an Output in one step, and put its words and table where a screen reader hears them.

    `spec` is plotly JSON: building a figure object at every step of a slider would take most of its time.
    """
    from labkit._display import CONFIG, PLOTLY, html_table

    words = html_table(table, tr("In figures"))
    figure = spec | {"layout": spec["layout"] | {"meta": {"alt": sentence}}, "config": CONFIG}
    bundle = {PLOTLY: figure, "text/html": words, "text/plain": sentence}
    place.outputs = ({"output_type": "display_data", "data": bundle, "metadata": {}},)
    said.value = STATUS.format(html.escape(sentence)) + words


# --- quizzes -----------------------------------------------------------------------------------------------------


def quiz(asked: Quiz) -> Any:
    """A form for a quiz: choices, a button and the explanation, one block a question."""

    return panel(*(_question(number, one) for number, one in enumerate(asked.questions, 1)))


def _question(number: int, question: Question) -> Any:
    import ipywidgets as w

    from labkit.course.quizzes import answer

    title = w.HTML(f"<p><strong>{number}. {html.escape(question.ask)}</strong></p>")
    said = w.HTML(STATUS.format(""))
    button = w.Button(description=tr("Check"), tooltip=tr("Check the answer to question {number}", number=number))
    wide = w.Layout(width="auto")
    if question.many:
        boxes = [w.Checkbox(False, description=o.text, tooltip=o.text, indent=False, layout=wide) for o in question.options]
        choice: Any = w.VBox(boxes)
    else:
        pairs = [(option.text, i) for i, option in enumerate(question.options)]
        choice = w.RadioButtons(options=pairs, index=None, description="", layout=wide)

    def judge(_: object) -> None:
        chosen = [i for i, box in enumerate(boxes) if box.value] if question.many else [choice.index]
        right, why = answer(question, [i for i in chosen if i is not None])
        word = tr("Right.") if right else tr("Not yet.")
        said.value = STATUS.format(f"<strong>{word}</strong> {html.escape(why)}")

    button.on_click(judge)
    choice.add_class("labkit-choice")
    return w.VBox([title, choice, button, said]).add_class("labkit-question")
