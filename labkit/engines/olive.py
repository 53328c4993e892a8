"""Olive: a workflow of passes that ends in a GenAI folder, the same kind the onnxruntime engine makes and runs.

The steps, in its words: workflow (the JSON configuration of a recipe), run_workflow (`olive run --config`), run_cli (one
command in a process of its own), Shell (many in one process). Beside them: registered (all passes), steps (what a run did),
search_over, write_data, write_workflow. `cd ARTIFACT && olive run --config olive.json` repeats a build. Nothing is fetched: all
data are local files.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit import engines
from labkit.engines import _genai, onnxruntime
from labkit.engines._genai import LOG, GenaiRunner, describe
from labkit.engines._olive_evaluator import METRICS, NAME
from labkit.engines._olive_report import passes_of, registered, search_over, steps, write_workflow
from labkit.engines._olive_shell import SILENT, Shell
from labkit.types import Artifact, Built, LabkitError, Recipe

__all__ = [
    "FAMILIES", "METRICS", "NAME", "PRECISIONS", "Shell", "build", "load", "passes_of", "perplexity", "registered", "run_cli",
    "run_workflow", "search_over", "steps", "workflow", "write_data", "write_workflow",
]  # fmt: skip

TITLE, PACKAGE, EXTRA = "Olive", "olive-ai", "onnx,train"
FAMILIES = onnxruntime.FAMILIES
# Bounds as in the onnxruntime engine; Olive quantizes embedding and head apart, so a tied matrix is stored twice.
PRECISIONS: Mapping[str, tuple[float, float]] = {
    "fp32": (32.0, 66.0),
    "int8": (8.0, 19.0),
    "int8_dynamic": (8.0, 19.0),
    "int8_static": (8.0, 19.0),
    "int4": (4.0, 37.0),
}
BUILD_BYTES_PER_WEIGHT = 12.0
SCRATCH_BITS_PER_WEIGHT = 96.0  # every pass keeps its output until the workflow ends
CONFIG, CALIBRATION, WINDOWS, OUTPUT = "olive.json", "calibration.json", "evaluation.json", "olive"
ALGORITHMS = ("rtn", "k_quant", "hqq", "gptq")
CALIBRATED = {"calibration": None, "samples": 16, "window": 256}  # text file (default: the house text), how much of it
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "fp32": CALIBRATED,
    "int8": {**CALIBRATED, "block_size": 32, "symmetric": True, "accuracy_level": 4},
    "int8_dynamic": {**CALIBRATED, "per_channel": True},
    "int8_static": {**CALIBRATED, "per_channel": True, "method": "MinMax"},
    "int4": {**CALIBRATED, "algorithm": "rtn", "block_size": 32, "symmetric": True, "accuracy_level": 4},
}
METHODS = ("MinMax", "Entropy", "Percentile")


def build(checkpoint: Any, recipe: Recipe, out: Path) -> Built:
    """Run the recipe's workflow into `out`. Options are those of OPTIONS for the precision."""
    engines.require("onnxruntime")
    options = _options(recipe)
    if checkpoint.family not in FAMILIES:
        raise LabkitError(
            f"Olive calls the ONNX model builder, which is not used for {checkpoint.architecture} here; expected a "
            f"model of one of the families {', '.join(FAMILIES)}."
        )
    source = _write_data(checkpoint, out, options)
    config = workflow(checkpoint, recipe.precision, **options)
    passes = run_workflow(config, out)
    settings = {**options, "calibration": source, "passes": passes, "metrics": {"perplexity": perplexity(out)}}
    return describe(out, settings, _notes(recipe.precision, options, config))


def load(artifact: Artifact, *, exact: bool = False, threads: int | None = None) -> GenaiRunner:
    """Open an artifact as the onnxruntime engine does. int8_dynamic and int8_static keep their int8 activations."""
    return GenaiRunner(artifact.path, exact=exact, threads=threads)


def workflow(checkpoint: Any, precision: str, **options: Any) -> dict[str, Any]:
    """Olive's JSON configuration for a precision: input, system, data, passes. Paths are relative."""
    options = {**OPTIONS[precision], **options}
    window = min(options["window"], checkpoint.context)
    return {
        "input_model": {"type": "HfModel", "model_path": str(checkpoint.path)},
        "systems": {"cpu": {"type": "LocalSystem", "accelerators": [
            {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}},
        "data_configs": [_data(checkpoint, window, options["samples"])],
        "passes": _passes(precision, options),
        "evaluate_input_model": False,
        "host": "cpu",
        "target": "cpu",
        "output_dir": OUTPUT,
        "cache_dir": "cache",
        "log_severity_level": 1,
    }  # fmt: skip


def run_workflow(config: Mapping[str, Any], folder: str | Path) -> list[dict[str, Any]]:
    """Write olive.json into `folder`, run it there, move the result up; returns the passes that ran."""
    folder = Path(folder)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    run_cli(["run", "--config", CONFIG], folder)
    made = folder / str(config["output_dir"])
    for file in made.iterdir():
        file.replace(folder / file.name)
    made.rmdir()
    shutil.rmtree(folder / str(config["cache_dir"]), ignore_errors=True)
    _restore_outputs(folder / "model.onnx")
    return _footprint(folder / "footprint.json")


def _restore_outputs(model: Path) -> None:
    """Give outputs their names back: Olive's block-wise passes call "logits" "logits_Q4", which GenAI does not find."""
    import onnx

    graph = onnx.load(model, load_external_data=False)
    renamed = {out.name: re.sub(r"_Q\d+$", "", out.name) for out in graph.graph.output if re.search(r"_Q\d+$", out.name)}
    if not renamed:
        return
    for out in graph.graph.output:
        out.name = renamed.get(out.name, out.name)
    for node in graph.graph.node:
        node.output[:] = [renamed.get(name, name) for name in node.output]
        node.input[:] = [renamed.get(name, name) for name in node.input]
    onnx.save(graph, model)  # the weights stay where they are, in the file beside it


def run_cli(arguments: Sequence[str], folder: str | Path) -> None:
    """`olive ARGUMENTS` in `folder`, in a child process, without network; what it prints goes to build.log there."""
    folder = Path(folder)
    caches = {name: str(folder / "hub") for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE")}
    command = [*map(str, arguments), "--disable_telemetry"]
    try:
        _genai.run_child("olive", folder / LOG, env={**caches, **SILENT}, cwd=folder, arguments=command)
    finally:
        shutil.rmtree(folder / "hub", ignore_errors=True)


def perplexity(folder: str | Path) -> float:
    """Perplexity of a GenAI folder, as it is run, on the windows of its evaluation.json."""
    folder = Path(folder)
    losses: list[np.ndarray] = []
    with GenaiRunner(folder) as run:
        for window in json.loads((folder / WINDOWS).read_text(encoding="utf-8")):
            rows = run.logits(window)[:-1].astype(np.float64)
            rows -= rows.max(axis=1, keepdims=True)
            losses.append(np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), window[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


def _passes(precision: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Pass name -> configuration, in the order they run."""
    # apart from the head, so that the passes can quantize the embedding lookup too
    share = {"shared_embeddings": precision == "fp32"}
    to_onnx = {"type": "ModelBuilder", "precision": "fp32", "extra_options": share}
    stored = {"save_as_external_data": True}
    if precision == "fp32":
        return {"builder": to_onnx}
    if precision == "int8_dynamic":
        dynamic = {"type": "OnnxDynamicQuantization", "precision": "int8", "per_channel": options["per_channel"]}
        return {"builder": to_onnx, "quantize": {**dynamic, **stored}}
    if precision == "int8_static":
        static = {
            "type": "OnnxStaticQuantization", "precision": "int8", "activation_type": "uint8", "quant_format": "QDQ",
            "per_channel": options["per_channel"], "calibrate_method": options["method"], "quant_preprocess": False,
            "data_config": "calibration", "op_types_to_exclude": ["GroupQueryAttention"],
        }  # fmt: skip
        return {"builder": to_onnx, "quantize": {**static, **stored}}
    return _block_passes(precision, options, to_onnx, stored)


def _block_passes(
    precision: str, options: Mapping[str, Any], to_onnx: dict[str, Any], stored: dict[str, Any]
) -> dict[str, Any]:
    block, level = options["block_size"], options["accuracy_level"]
    algorithm = options.get("algorithm", "rtn")
    if algorithm == "gptq":  # works on the checkpoint; the builder then takes its quantized weights over
        gptq = {"type": "Gptq", "bits": 4, "group_size": block, "data_config": "calibration"}
        gptq["sym"] = options["symmetric"]
        builder = {
            "type": "ModelBuilder", "precision": "int4", "int4_block_size": block, "int4_accuracy_level": level,
            "int4_is_symmetric": options["symmetric"],
        }  # fmt: skip
        return {"quantize": gptq, "builder": builder}
    common = {"block_size": block, "accuracy_level": level, **stored}
    kinds = {
        "rtn": {"type": "OnnxBlockWiseRtnQuantization", "bits": 8 if precision == "int8" else 4,
                "is_symmetric": options["symmetric"]},
        "k_quant": {"type": "OnnxKQuantQuantization", "bits": 4},
        "hqq": {"type": "OnnxHqqQuantization"},
    }  # fmt: skip
    return {"builder": to_onnx, "quantize": {**kinds[algorithm], **common}}


def write_data(checkpoint: Any, folder: str | Path, *, text: str | Path | None = None, samples: int = 16, window: int = 256) -> dict[str, Any]:
    """Write calibration.json and evaluation.json into `folder`; returns the data_configs entry that reads the former.

    `text`: a UTF-8 file, by default the house's calibration text. The evaluation windows are the text that follows.
    """
    _write_data(checkpoint, Path(folder), {"calibration": text, "samples": samples, "window": window})
    return _data(checkpoint, min(window, checkpoint.context), samples)


def _data(checkpoint: Any, window: int, samples: int) -> dict[str, Any]:
    """Olive's own text pipeline over a local file: joined, tokenized, cut into windows."""
    cut = {
        "model_name": str(checkpoint.path), "text_cols": "text", "strategy": "join", "add_special_tokens": False,
        "max_seq_len": window, "max_samples": samples,
    }  # fmt: skip
    return {
        "name": "calibration",
        "type": "HuggingfaceContainer",
        "load_dataset_config": {"data_name": "json", "data_files": CALIBRATION, "split": "train"},
        "pre_process_data_config": cut,
        "dataloader_config": {"batch_size": 1},
    }


def _write_data(checkpoint: Any, out: Path, options: Mapping[str, Any]) -> str:
    """Calibration text and evaluation windows (the text after it) into `out`; returns where the text came from."""
    text, source = _text(options["calibration"])
    window, samples = min(options["window"], checkpoint.context), options["samples"]
    ids = checkpoint.encode(text[: 40 * window * (samples + 8)])
    need = window * (samples + 4)
    if len(ids) < need:
        raise LabkitError(
            f"{source} has {len(ids)} tokens; {samples} windows of {window} and 4 to evaluate on need {need}. "
            "Give a longer text, fewer samples or a shorter window."
        )
    cut = [checkpoint.decode(ids[i : i + window]) for i in range(0, window * samples, window)]
    (out / CALIBRATION).write_text("\n".join(json.dumps({"text": part}) for part in cut) + "\n", encoding="utf-8")
    rest = ids[window * samples : need]
    held = [rest[i : i + window] for i in range(0, len(rest), window)]
    (out / WINDOWS).write_text(json.dumps(held), encoding="utf-8")
    return source


def _text(path: str | Path | None) -> tuple[str, str]:
    if path is None:
        from labkit import house

        return house.calibration_text(), "the house calibration text"
    try:
        return Path(path).read_text(encoding="utf-8"), Path(path).name
    except (OSError, UnicodeDecodeError) as error:
        raise LabkitError(f"The calibration text {path} cannot be read ({error}); expected a UTF-8 file.") from None


def _options(recipe: Recipe) -> dict[str, Any]:
    known = OPTIONS[recipe.precision]
    unknown = sorted(set(recipe.options) - set(known))
    if unknown:
        raise LabkitError(f"Olive {recipe.precision} has no option {unknown[0]!r}; expected one of {', '.join(known)}.")
    options = {**known, **recipe.options}
    allowed = {
        "algorithm": ALGORITHMS, "block_size": onnxruntime.BLOCKS, "accuracy_level": (1, 4), "symmetric": (True, False),
        "per_channel": (True, False), "method": METHODS,
    }  # fmt: skip
    for name, values in allowed.items():
        if name in options and options[name] not in values:
            raise LabkitError(f"{name}={options[name]!r} was given; expected one of {', '.join(map(str, values))}.")
    for name in ("samples", "window"):
        if not isinstance(options[name], int) or options[name] < 2:
            raise LabkitError(f"{name}={options[name]!r} was given; expected a whole number of at least 2.")
    return options


def _notes(precision: str, options: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    notes = []
    if precision == "int8_static":
        notes.append("GroupQueryAttention stays float32: it has no int8 form on the CPU.")
    if options.get("algorithm") in ("k_quant", "hqq"):
        notes.append(f"{options['algorithm']} chooses scales and zero points itself; the option symmetric is not used.")
    if options.get("algorithm") == "gptq":
        notes.append("Olive's GPTQ leaves the head to the model builder, which rounds it to nearest.")
    return notes


def _footprint(path: Path) -> list[dict[str, Any]]:
    """The passes that ran, with their seconds and configuration, from Olive's footprint."""
    return [
        {"pass": n["from_pass"], "seconds": n["end_time"] - n["start_time"], "config": _without(n["pass_run_config"])}
        for n in json.loads(path.read_text(encoding="utf-8")).values()
        if n["from_pass"]
    ]


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    """A pass's configuration without what was left open and without its data, which olive.json describes."""
    return {k: v for k, v in config.items() if v is not None and k != "data_config"}
