"""Parameters given to labs, checked against the types their parameters cells declare."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from labkit.course.labs import Lab
from labkit.course.session import PROFILES
from labkit.types import LabkitError

TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str, "list": list, "dict": dict, "tuple": tuple}


def declared(lab: Lab) -> dict[str, dict[str, Any]]:
    """Name -> {"inferred_type_name", "default", "help"} as papermill reads the parameters cell."""
    import nbformat
    from papermill.translators import PythonTranslator

    try:
        cells = nbformat.read(lab.path, as_version=4).cells
    except (OSError, ValueError) as error:  # nbformat's own errors are ValueErrors
        raise LabkitError(
            f"{lab.path} is not a readable notebook ({type(error).__name__}); restore it from the course."
        ) from error
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return {p.name: p._asdict() for cell in tagged[:1] for p in PythonTranslator.inspect(cell)}


def for_labs(labs: Sequence[Lab], profile: str, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Lab id -> the parameters that lab takes. Raises one sentence for an unknown name or a value of a wrong type."""
    if profile not in PROFILES:
        raise LabkitError(f"Unknown profile {profile!r}; expected one of {', '.join(PROFILES)}.")
    known = {lab.id: declared(lab) for lab in labs}
    for name in given:
        if not any(name in one for one in known.values()):
            there = sorted({n for one in known.values() for n in one})
            raise LabkitError(f"None of the chosen labs has a parameter {name!r}; they have {', '.join(there)}.")
    chosen = {"profile": profile, **given}
    return {
        lab: {name: typed(name, chosen[name], one[name]["inferred_type_name"]) for name in chosen if name in one}
        for lab, one in known.items()
    }


def typed(name: str, value: Any, declared: str) -> Any:
    """`value` (text from the command line, or a Python value) as the declared type."""
    kind = str(declared).split("[")[0].split("|")[0].strip()
    if kind not in TYPES:
        return value
    if isinstance(value, str) and kind != "str":
        value = _literal(value)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = isinstance(value, TYPES[kind]) and isinstance(value, bool) == (kind == "bool")
    if not right and not (value is None and "None" in str(declared)):
        raise LabkitError(f"Parameter {name} takes {declared}, got {value!r} ({type(value).__name__}).")
    return value


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
