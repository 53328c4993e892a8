"""Weight compression by NNCF: options checked in advance, calibration text turned into what it samples from."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from labkit._signals import signal_stack_kept
from labkit.types import LabkitError

INT8 = ("int8_sym", "int8_asym")
EIGHT = (*INT8, "fp8_e4m3", "mxfp8_e4m3")  # embeddings and last layer get no wider type than the rest
FIXED_GROUP = {"mxfp4": 32, "mxfp8_e4m3": 32, "nvfp4": 16}  # the format decides
GROUPS = (128, 64, 32)  # tried in this order when none is asked for; NNCF's own default is the first
PLAIN = {"ignored": None, "all_layers": None}
GROUPED = {"group_size": None, "ratio": None, "backup_mode": None, "sensitivity": None, **PLAIN}
DATA = {"awq": None, "scale_estimation": None, "gptq": None}
CALIBRATION = {"calibration": None, "samples": 32, "window": 128}


def accepted(precision: str) -> dict[str, Any]:
    """Option -> default for a precision.

    group_size: weights that share a scale along a row (-1: the whole row). ratio: share of the weights in the
    compressible layers that gets the named precision, least sensitive layers first; the rest gets backup_mode
    ("none", "int8_sym", "int8_asym" ...). all_layers: embeddings and last layer too, instead of backup_mode for them.
    sensitivity: how layers are ranked. awq, scale_estimation, gptq: corrections; they and a ratio below 1 can use
    calibration (a text file, or None for the house's calibration text), `samples` windows of `window` tokens.
    ignored: names of layers left alone.
    """
    if precision in INT8:
        return {"ignored": None}
    if precision in FIXED_GROUP or precision == "fp8_e4m3":
        return {**GROUPED, **CALIBRATION}
    return {**GROUPED, **DATA, **CALIBRATION}


@signal_stack_kept()
def compress(
    model: Any, precision: str, checkpoint: Any, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], list[str]]:
    """(compressed model, settings used, notes). `checkpoint` gives the calibration text its token ids."""
    nncf = _nncf()
    known = accepted(precision)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise LabkitError(f"OpenVINO {precision} has no option {unknown[0]!r}; expected one of {', '.join(known)}.")
    chosen = {**known, **options}
    notes: list[str] = []
    if precision not in INT8:
        chosen["group_size"] = _group(model, precision, chosen["group_size"], notes)
    arguments, said = _arguments(nncf, precision, chosen, checkpoint)
    try:
        result = nncf.compress_weights(model, mode=nncf.CompressWeightsMode(precision), **arguments)
    except (nncf.ValidationError, nncf.ParameterNotSupportedError, nncf.InvalidGroupSizeError) as error:
        raise LabkitError(f"NNCF refuses {precision} with {dict(options)}: {str(error).splitlines()[0]}") from error
    if precision not in EIGHT and not chosen["all_layers"]:
        backup = chosen["backup_mode"] or ("mxfp8_e4m3" if precision == "mxfp4" else "int8_asym")
        notes.append(f"Embeddings and last layer are kept at {backup} unless all_layers is set.")
    return result, said, notes


def _nncf() -> Any:
    os.environ.setdefault("NNCF_CI", "1")  # without it NNCF reports every call to an analytics server
    import nncf
    import rich

    rich.reconfigure(force_jupyter=False, force_terminal=False)  # in a notebook its bars would be widgets; this is the log
    for handler in logging.getLogger("nncf").handlers:  # it keeps the stdout of its first import, a log since closed
        if type(handler) is logging.StreamHandler:  # not the ones a test runner adds
            handler.stream = sys.stdout  # setStream would first flush the closed one
    return nncf


def row_lengths(model: Any) -> set[int]:
    """Lengths of the rows a layer's product sums over: groups must divide them."""
    found = set()
    for node in model.get_ops():
        if node.get_type_name() == "MatMul" and node.get_attributes()["transpose_b"]:
            found.add(node.input_value(1).get_partial_shape()[-1].get_length())
    return found


def _group(model: Any, precision: str, asked: int | None, notes: list[str]) -> int:
    rows = row_lengths(model)
    fixed = FIXED_GROUP.get(precision)
    if fixed and asked not in (None, fixed):
        raise LabkitError(f"{precision} has groups of {fixed}; group_size {asked} was given. Leave it out.")
    asked = asked or fixed
    fits = [size for size in GROUPS if all(n % size == 0 for n in rows)]
    if asked is None:
        if not fits:
            raise LabkitError(f"Rows of {_some(rows)} weights do not divide by 32; give group_size=-1, a scale a row.")
        if fits[0] != GROUPS[0]:
            notes.append(f"Groups of {fits[0]}, not {GROUPS[0]}: rows of {_some(rows)} weights do not divide by more.")
        return fits[0]
    bad = [n for n in sorted(rows) if asked != -1 and (asked < 1 or n % asked)]
    if bad:
        choice = f"; these sizes do: {', '.join(map(str, fits))}" if fits else ""
        raise LabkitError(f"Rows of {bad[0]} weights do not divide into groups of {asked}{choice}.")
    return asked


def _some(rows: set[int]) -> str:
    return ", ".join(map(str, sorted(rows)))


def _arguments(nncf: Any, precision: str, chosen: Mapping[str, Any], checkpoint: Any) -> tuple[dict, dict]:
    """What `nncf.compress_weights` takes, and the same in JSON for the record."""
    said = {k: v for k, v in chosen.items() if v is not None and k not in CALIBRATION}
    arguments = {k: v for k, v in said.items() if k in ("group_size", "ratio", "all_layers", *DATA)}
    if "backup_mode" in said:
        arguments["backup_mode"] = _member(nncf.BackupMode, said["backup_mode"], "backup_mode")
    if "sensitivity" in said:
        arguments["sensitivity_metric"] = _member(nncf.SensitivityMetric, said["sensitivity"], "sensitivity")
    if "ignored" in said:
        arguments["ignored_scope"] = nncf.IgnoredScope(names=list(said["ignored"]))
    if _wants_data(chosen):
        text, source = _text(chosen["calibration"])
        samples = _samples(checkpoint, text, chosen["samples"], chosen["window"])
        arguments["dataset"], arguments["subset_size"] = nncf.Dataset(samples), len(samples)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        said["calibration"] = {"source": source, "sha256": digest, "windows": len(samples), "window": chosen["window"]}
    return arguments, said


def _wants_data(chosen: Mapping[str, Any]) -> bool:
    by_activation = chosen.get("sensitivity") not in (None, "weight_quantization_error")
    return bool(chosen.get("calibration") or by_activation or any(chosen.get(name) for name in DATA))


def _member(kind: Any, value: str, option: str) -> Any:
    try:
        return kind(str(value).lower())
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise LabkitError(f"{option} {value!r} is unknown; expected one of {known}.") from None


def _text(calibration: str | Path | None) -> tuple[str, str]:
    if calibration is None:
        from labkit.house import calibration_text

        return calibration_text(), "labkit.house.calibration_text"
    path = Path(calibration).expanduser()
    if not path.is_file():
        raise LabkitError(f"Calibration text {path} is not a file; give one, or leave it out for the house's text.")
    return path.read_text(encoding="utf-8"), path.name


def _samples(checkpoint: Any, text: str, count: int, window: int) -> list[dict[str, np.ndarray]]:
    """Windows spread evenly over the text, as the graph's inputs."""
    ids = np.asarray(checkpoint.encode(text), dtype=np.int64)
    if len(ids) < window:
        raise LabkitError(f"The calibration text has {len(ids)} tokens; expected at least one window of {window}.")
    starts = np.unique(np.linspace(0, len(ids) - window, min(count, len(ids) // window)).astype(int))
    return [inputs(ids[start : start + window]) for start in starts]


def inputs(ids: np.ndarray) -> dict[str, np.ndarray]:
    """One sequence from the start, as the graph's four inputs."""
    row = np.asarray(ids, dtype=np.int64)[None]
    beam = np.zeros(1, dtype=np.int32)
    return {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "position_ids": np.arange(row.shape[1], dtype=np.int64)[None],
        "beam_idx": beam,
    }
