"""Apple MLX through mlx-lm: affine and microscaling formats, on Apple GPUs and (as a slow reference) on Linux CPUs.

The steps are `convert_mlx` (checkpoint -> MLX folder) and `quantize_mlx` (MLX folder -> smaller one); `tune_mlx` trains
an adapter on `write_data`'s folder and `fuse_mlx` adds it to the weights; `restored_weights` reads a folder by numpy alone.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit.engines import _mlx_config, _mlx_weights
from labkit.engines._mlx_lora import GGUF as GGUF
from labkit.engines._mlx_lora import Adapters
from labkit.engines._mlx_lora import fuse_mlx as fuse_mlx
from labkit.engines._mlx_lora import tune_mlx as tune_mlx
from labkit.engines._mlx_lora import write_data as write_data
from labkit.engines._tokens import checked
from labkit.types import Artifact, Built, LabkitError, Recipe

TITLE, PACKAGE, EXTRA = "MLX", "mlx", "mlx"
MODULES = ("labkit.engines._mlx_blas", "mlx.core", "mlx_lm.utils", "mlx_lm.generate")  # what a loaded model has imported
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
AFFINE = {"q2": 2, "q3": 3, "q4": 4, "q5": 5, "q6": 6, "q8": 8}
MIXED = {"mixed_2_6": 2, "mixed_3_4": 3, "mixed_3_6": 3, "mixed_4_6": 4}
MICRO = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # bits, group: the format decides
GROUPS = (64, 32)  # tried in this order when none is asked for; mlx-lm's own default is the first
# Affine groups store a scale and an offset: 2 x 16 / group bits a weight, twice that when they are float32.
PRECISIONS: Mapping[str, tuple[float, float]] = {
    "f32": (32.0, 32.1),
    "bf16": (16.0, 16.1),
    "f16": (16.0, 16.1),
    "q8": (8.25, 10.1),
    "mxfp8": (8.25, 8.4),
    "q6": (6.25, 8.1),
    "q5": (5.25, 7.1),
    "mixed_4_6": (4.25, 8.1),
    "q4": (4.25, 6.1),
    "nvfp4": (4.5, 4.7),
    "mxfp4": (4.25, 4.4),
    "mixed_3_6": (3.25, 8.1),
    "mixed_3_4": (3.25, 6.1),
    "q3": (3.25, 5.1),
    "mixed_2_6": (2.25, 8.1),
    "q2": (2.25, 4.1),
}
BUILD_BYTES_PER_WEIGHT = 5.0  # weights are widened to float32 before they are rounded


def build(checkpoint: Any, recipe: Recipe, out: Path) -> Built:
    """Write model.safetensors and config.json for mlx-lm into `out`.

    Options of quantized precisions: group_size (32, 64, 128), dtype of scales and of what is not quantized
    ("float32", "float16", "bfloat16"; default: as the checkpoint stores them).
    """
    precision, options = recipe.precision, dict(recipe.options)
    allowed = () if precision in DTYPES else ("dtype",) if precision in MICRO else ("group_size", "dtype")
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        known = f"expected one of {', '.join(allowed)}" if allowed else "it takes none"
        raise LabkitError(f"MLX {precision} has no option {unknown[0]!r}; {known}.")
    laid, longest, notes = _mlx_config.overrides(checkpoint.config)
    model, config = _open(checkpoint.path, laid)
    if precision in DTYPES:
        settings = {"dtype": DTYPES[precision]}
        _cast(model, settings["dtype"])
    else:
        stored = STORED[checkpoint.tensors()["model.embed_tokens.weight"].dtype]
        settings, more = _quantize(model, config, precision, options.get("group_size"), options.get("dtype", stored))
        notes += more
    _save(model, config, out, checkpoint.path)
    settings |= {"config_overrides": laid, "longest": longest}
    return Built(sum(size for _, _, size in stored_tensors(out).values()), settings, tuple(notes))


def convert_mlx(checkpoint: Any, folder: Path, precision: str = "f32") -> Path:
    """Write a checkpoint as an MLX folder with f32, f16 or bf16 weights; the folder."""
    if precision not in DTYPES:
        raise LabkitError(f"MLX converts at {', '.join(DTYPES)}; {precision!r} was given. Then use quantize_mlx.")
    model, config = _open(checkpoint.path, _mlx_config.overrides(checkpoint.config)[0])
    _cast(model, DTYPES[precision])
    return _save(model, config, folder, checkpoint.path)


def quantize_mlx(
    source: Path, folder: Path, precision: str, *, group_size: int | None = None, dtype: str = "float16"
) -> Path:
    """Quantize an MLX folder into another; scales, offsets and norms are stored as `dtype`."""
    if Path(folder).resolve() == Path(source).resolve():
        raise LabkitError(f"{folder} holds the model to quantize; give another folder for the result.")
    model, config = _open(source, {})
    if "quantization" in config:
        raise LabkitError(f"{source} is quantized already; quantize the float model it came from.")
    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm tells the bits it had before scales were stored as `dtype`
        _quantize(model, config, precision, group_size, dtype)
    return _save(model, config, folder, source)


def stored_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name -> (dtype, shape, bytes) of everything in an MLX folder's safetensors, packed weights included."""
    found: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = (entry["dtype"], tuple(entry["shape"]), last - first)
    return found


def restored_weights(folder: Path) -> dict[str, np.ndarray]:
    """Tensor name -> float32 weights of an MLX folder, every format of `PRECISIONS`; MLX itself is not needed."""
    return _mlx_weights.restored(folder)


def quantization(folder: Path) -> dict[str, Any]:
    """The settings mlx-lm reads back: group_size, bits, mode, and by layer name a map of its own for each exception."""
    return _mlx_weights.quantization(folder)


def load(artifact: Artifact, *, exact: bool = False, threads: int | None = None) -> _Runner:
    """Open an MLX folder. Exact: weights opened to float32 once, arithmetic in float32 (the same weight values)."""
    return _Runner(artifact, exact, threads)


def load_adapted(artifact: Artifact, adapters: Mapping[str, Any], *, exact: bool = False, threads: int | None = None) -> _Adapted:
    """As `load`, with adapters (name -> labkit.adapters.Adapter) beside the weights; see labkit.adapters.load."""
    return _Adapted(artifact, adapters, exact, threads)


def _open(folder: Path, laid: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    from labkit.engines import _mlx_blas  # noqa: F401 - before MLX

    # isort: split
    from mlx_lm.utils import load_model

    try:
        return load_model(Path(folder), lazy=True, model_config=dict(laid))
    except ValueError as error:
        raise LabkitError(f"mlx-lm cannot open {folder}: {str(error).splitlines()[0]} Try another engine.") from error


def _save(model: Any, config: dict[str, Any], folder: Path, source: Path) -> Path:
    import shutil

    from mlx_lm.utils import save_config, save_model

    save_model(folder, model)
    save_config({k: v for k, v in config.items() if v is not None}, Path(folder) / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, Path(folder) / name)
    return Path(folder)


def _cast(model: Any, dtype: str) -> None:
    """Floating parameters to `dtype`; packed weights and microscaling exponents are integers and stay."""
    import mlx.core as mx
    from mlx.utils import tree_map

    kind = getattr(mx, dtype)
    model.update(tree_map(lambda p: p.astype(kind) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters()))


def _quantize(
    model: Any, config: dict[str, Any], precision: str, group_size: int | None, dtype: str
) -> tuple[dict[str, Any], list[str]]:
    """Round the model in place, from float32 values; `config` gets the settings mlx-lm reads back."""
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    if dtype not in STORED.values():
        raise LabkitError(f"dtype {dtype!r} is unknown; expected one of {', '.join(STORED.values())}.")
    if precision not in PRECISIONS or precision in DTYPES:
        raise LabkitError(f"MLX quantizes to {', '.join(p for p in PRECISIONS if p not in DTYPES)}; not {precision!r}.")
    notes: list[str] = []
    bits = AFFINE.get(precision) or MIXED.get(precision) or MICRO[precision][0]
    group = _group(model, precision, group_size, notes)
    mixed = mixed_quant_predicate_builder(precision, model, group) if precision in MIXED else None
    _cast(model, "float32")
    mode = precision if precision in MICRO else "affine"
    _, done = quantize_model(model, config, group, bits, mode=mode, quant_predicate=mixed)
    config.update(quantization=done["quantization"], quantization_config=done["quantization"])
    _cast(model, dtype)
    return {"group_size": group, "bits": bits, "mode": mode, "dtype": dtype}, notes


def _group(model: Any, precision: str, asked: int | None, notes: list[str]) -> int:
    rows = {module.weight.shape[-1] for _, module in model.named_modules() if hasattr(module, "to_quantized")}
    said = ", ".join(map(str, sorted(rows)))
    fits = [size for size in GROUPS if all(n % size == 0 for n in rows)]
    if asked is None and precision not in MICRO:
        if not fits:
            raise LabkitError(f"Rows of {said} weights do not divide into groups of 32, the smallest MLX has.")
        if fits[0] != GROUPS[0]:
            notes.append(f"Groups of {fits[0]}, not {GROUPS[0]}: rows of {said} weights do not divide by more.")
        return fits[0]
    group = MICRO[precision][1] if precision in MICRO else asked
    if asked not in (None, 32, 64, 128):
        raise LabkitError(f"MLX has groups of 32, 64 and 128; group_size {asked} was given.")
    bad = [n for n in sorted(rows) if n % group]
    if bad:  # mlx-lm would leave such a tensor at full width without a word
        raise LabkitError(f"Rows of {bad[0]} weights do not divide into groups of {group}; take a smaller group_size.")
    return group


class _Runner:
    def __init__(self, artifact: Artifact, exact: bool, threads: int | None):
        from labkit.engines._mlx_blas import BLAS  # before MLX

        # isort: split
        import mlx.core as mx
        from mlx_lm.utils import dequantize_model

        if threads is not None and threads < 1:
            raise LabkitError(f"threads must be at least 1; {threads} was given.")
        self._limits = artifact.checkpoint.vocab_size, artifact.checkpoint.context
        self._longest = artifact.settings.get("longest")
        device = mx.default_device()
        cpu = device.type == mx.DeviceType.cpu
        model, config = _open(artifact.path, {})
        if exact or cpu:  # 16-bit products are summed in 16 bits on the CPU: only float32 is right there
            _cast(model, "float32")
        if exact and "quantization" in config:
            model = dequantize_model(model)
            _cast(model, "float32")
        mx.eval(model.parameters())
        self._model = model.eval()
        compute = "float32" if exact or cpu else artifact.settings["dtype"]
        self.settings: dict[str, Any] = {
            "device": "cpu" if cpu else str(mx.device_info().get("device_name", device)),
            "exact": exact,
            "threads": 1 if cpu else None,  # MLX has no setting for it: one thread a stream
            "blas": BLAS if cpu else None,
            "threads_asked": threads,
            "inference_precision": compute,
            "kv_cache": compute,
            "weights": "float32, opened once" if exact and "quantization" in config else "as stored",
            "reference_path": cpu,  # speed on the CPU says nothing about Apple GPUs
        }

    def _checked(self, tokens: Sequence[int], more: int = 0) -> np.ndarray:
        if self._model is None:
            raise LabkitError("This runner is closed; load the artifact again.")
        ids = checked(tokens, *self._limits, more)
        if self._longest and ids.size + more > self._longest:
            raise LabkitError(f"mlx-lm is right up to {self._longest} tokens here; {ids.size + more} were asked for.")
        return ids

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits for every position, (T, V) float32; row i predicts token i + 1."""
        import mlx.core as mx

        ids = self._checked(tokens)
        return np.array(self._model(mx.array(ids[None]))[0].astype(mx.float32))

    def generate(self, tokens: Sequence[int], max_new: int) -> Iterator[int]:
        """Greedy continuation of exactly `max_new` ids, by mlx-lm's own loop with a fresh cache."""
        ids = self._checked(tokens, max_new)
        return self._stream(ids, max_new) if max_new > 0 else iter(())

    def _stream(self, ids: np.ndarray, max_new: int) -> Iterator[int]:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        for token, _ in generate_step(mx.array(ids), self._model, max_tokens=max_new):
            yield int(token)

    def close(self) -> None:
        """Free the weights and MLX's buffer cache. Safe to call twice."""
        if self._model is not None:
            import mlx.core as mx

            self._model = None
            mx.clear_cache()

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Adapted(_Runner):
    def __init__(self, artifact: Artifact, adapters: Mapping[str, Any], exact: bool, threads: int | None):
        super().__init__(artifact, exact, threads)
        self._switch = Adapters(self._model, adapters)

    def use(self, name: str | None) -> None:
        """Answer with this adapter from now on; None: with the base alone."""
        self._switch.use(name)
