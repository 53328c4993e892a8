"""Claims about the packages themselves, read from the versions that are installed; an absent package says so."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable
from functools import partial, wraps
from importlib import metadata
from inspect import signature
from pathlib import Path
from types import ModuleType

from labkit.claims import Found, computed


def _source(module: str, *parts: str) -> str:
    """Text of a file of an installed package; nothing of the package is imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise metadata.PackageNotFoundError(module)
    return Path(spec.origin).parent.joinpath(*parts).read_text(encoding="utf-8")


def _installed(function: Callable[[], Found]) -> Callable[[], Found]:
    @wraps(function)
    def told() -> Found:
        try:
            return function()
        except metadata.PackageNotFoundError as absent:
            return Found(f"{absent.name}, which is not installed", None, "needs")

    return told


def _python(package: str, stated: str) -> Found:
    found = metadata.metadata(package)["Requires-Python"]
    return Found(f"{package} {metadata.version(package)} asks for Python {found}", found == f">={stated}")


for _id, _package, _stated in (
    ("C099", "olive-ai", "3.8"), ("C107", "openvino", "3.8"), ("C113", "mlx-lm", "3.8"), ("C135", "onnxruntime-qnn", "3.7"),
):  # fmt: skip
    computed(_id)(_installed(partial(_python, _package, _stated)))


@computed("C063", "C093")
@_installed
def olive_passes() -> Found:
    passes = json.loads(_source("olive", "olive_config.json"))["passes"]
    return Found(f"olive-ai {metadata.version('olive-ai')} registers {len(passes)} passes", len(passes) >= 40)


@computed("C085")
@_installed
def olive_precisions() -> Found:
    text = _source("olive", "cli", "optimize.py")
    block = text[text.index('"--precision"') :]
    names = [word.split(",")[0] for word in block[block.index("[") : block.index("]")].split("Precision.")[1:]]
    return Found(
        f"`olive optimize --precision` takes {', '.join(name.strip().lower() for name in names)}",
        any(n[-1] == "1" for n in names),
    )


@computed("C100")
@_installed
def olive_log_level() -> Found:
    text = _source("olive", "cli", "base.py")
    said = text[text.index("Logging level.") :].split('"')[0]
    return Found(said.replace("{default}", "3"), "0: minimal" in said)


@computed("C159")
@_installed
def olive_finetune() -> Found:
    tree = ast.parse(_source("olive", "cli", "finetune.py"))
    found = {}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant):
            default = [k.value for k in call.keywords if k.arg == "default"]
            if default and isinstance(default[0], ast.Constant):
                found[call.args[0].value] = default[0].value
    return Found(", ".join(f"{name[2:]} {found[name]}" for name in ("--lora_r", "--lora_alpha")), None)


def _nncf() -> ModuleType:
    if importlib.util.find_spec("nncf") is None:
        raise metadata.PackageNotFoundError("nncf")
    return importlib.import_module("nncf")


@computed("C105")
@_installed
def nncf_samples() -> Found:
    nncf = _nncf()
    sizes = {f.__name__: signature(f).parameters["subset_size"].default for f in (nncf.quantize, nncf.compress_weights)}
    return Found(
        f"nncf {nncf.__version__} takes by default " + " and ".join(f"{n} samples in {k}" for k, n in sizes.items()), False
    )


@computed("C106")
@_installed
def nncf_configuration() -> Found:
    nncf = _nncf()
    kept = "still has" if hasattr(nncf, "NNCFConfig") else "no longer has"
    return Found(
        f"nncf {nncf.__version__} {kept} the configuration file these numbers stood in; language models have no batch norm", False
    )


@computed("C114")
@_installed
def mlx_version() -> Found:
    found = metadata.version("mlx")
    return Found(f"installed here: {found}", found.startswith("0.26.5"))


@computed("C179", "C180")
@_installed
def builder_choices() -> Found:
    text = _source("onnxruntime_genai", "models", "builder.py")
    found = {}
    for name in ("--precision", "--execution_provider"):
        block = text[text.index(f'"{name}"') :]
        found[name] = ast.literal_eval(block[block.index("[") : block.index("]") + 1])
    return Found("; ".join(f"{name[2:]}: {', '.join(options)}" for name, options in found.items()), None)


@computed("C183")
@_installed
def version_floors() -> Found:
    names = ("nncf", "openvino", "transformers")
    return Found("installed here: " + ", ".join(f"{name} {metadata.version(name)}" for name in names), None)


@computed("C170")
@_installed
def genai_wheel() -> Found:
    wheel = (metadata.distribution("onnxruntime-genai").read_text("WHEEL") or "").split("Tag: ")[1].split()[0]
    return Found(f"installed from the wheel {wheel}: no CMake, nothing compiled", False)
