"""A checkpoint is files: config, tokenizer, safetensors. Find or fetch it, check it, speak its token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from labkit import _shapes
from labkit._chat import render
from labkit._files import read_json
from labkit._tensors import Tensors, TensorView, is_finite, open_tensors
from labkit.i18n import tr
from labkit.types import LabkitError

__all__ = ["Checkpoint", "TensorView", "Tensors", "check_finite", "checkpoint", "open_checkpoint", "open_tensors"]

WHOLE = 32_000_000  # files up to this many bytes are hashed whole for the fingerprint, larger ones by samples
# What a checkpoint consists of beside its weights. A card or figures written beside them change no artifact.
SMALL_FILES = ("config.json", "generation_config.json", "*token*.json", "vocab.json", "*.index.json", "*.jinja")


@dataclass(frozen=True)
class Checkpoint:
    """Files of one model, not a loaded model. `trained` is False for stand-ins: their quality means nothing."""

    path: Path
    name: str
    revision: str
    config: dict[str, Any] = field(compare=False, repr=False)
    trained: bool = True

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; no begin-of-text id is added.

        `special=False` treats look-alikes of special tokens ("<|im_end|>" typed by a user) as plain text.
        """
        return (self.tokenizer if special else self._plain).encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Text of token ids; `special=False` leaves special tokens out. Raises LabkitError for an id out of range."""
        ids = [int(i) for i in ids]
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise LabkitError(f"Token id {wrong} is out of range; {self.name} has ids 0 to {self.vocab_size - 1}.")
        return self.tokenizer.decode(ids, skip_special_tokens=not special)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **extra: Any) -> str:
        """Text of a conversation in the checkpoint's own template; `extra` goes to the template as variables."""
        return render(self.path, messages, add_generation_prompt=add_generation_prompt, **extra)

    @cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` of tokenizer.json, with truncation and padding switched off."""
        return _tokenizer(self.path)

    @cached_property
    def _plain(self) -> Any:
        plain = _tokenizer(self.path)
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _tensors(self) -> Tensors:
        return open_tensors(self.path)

    def tensors(self) -> Tensors:
        """Tensor name -> TensorView: read-only, memory-mapped."""
        return self._tensors

    @property
    def architecture(self) -> str:
        """The class name in config.json, e.g. "LlamaForCausalLM"; "unknown" when it names none."""
        return (self.config.get("architectures") or ["unknown"])[0]

    @property
    def family(self) -> str | None:
        """llama, mistral, qwen2, qwen3, phi3 or gemma3; None for another architecture."""
        return _shapes.family(self.config)

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding matrix."""
        return _shapes.tied(self.config) or "lm_head.weight" not in self._tensors

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix: the number of logits."""
        return int(self.config["vocab_size"])

    @property
    def context(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return int(self.config.get("max_position_embeddings") or 2048)

    @cached_property
    def weights(self) -> int:
        """Number of parameters, tied ones counted once (from the safetensors headers)."""
        twice = _shapes.tied(self.config) and "model.embed_tokens.weight" in self._tensors
        return sum(view.weights for name, view in self._tensors.items() if not (twice and name == "lm_head.weight"))

    @cached_property
    def bos_id(self) -> int | None:
        """The begin-of-text id the tokenizer puts before a text, None when it puts none."""
        ids = self.tokenizer.encode("a", add_special_tokens=True).ids
        return ids[0] if ids[:1] != self.encode("a")[:1] else None

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, from generation_config.json, else config.json."""
        file = self.path / "generation_config.json"
        settings = read_json(file, "Generation settings") if file.exists() else {}
        value = settings.get("eos_token_id", self.config.get("eos_token_id"))
        return tuple(value) if isinstance(value, list) else () if value is None else (value,)

    @cached_property
    def fingerprint(self) -> str:
        """Cheap identity of the contents: small files whole; of large ones header, size and samples."""
        digest = hashlib.sha256()
        small = sorted(p for pattern in SMALL_FILES for p in self.path.glob(pattern))
        for file in [*small, *self._tensors.files]:
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            _digest_file(file, digest)
        return digest.hexdigest()

    def _repr_html_(self) -> str:
        rows = {
            "checkpoint": f"{self.name} ({tr('trained') if self.trained else tr('stand-in, random weights')})",
            tr("architecture"): self.architecture,
            tr("parameters"): f"{self.weights:,}",
            tr("vocabulary"): f"{self.vocab_size:,}",
            tr("context"): tr("{n} tokens", n=f"{self.context:,}"),
            tr("revision"): self.revision,
        }
        cells = "".join(f"<tr><th scope='row'>{k}</th><td style='text-align:left'>{v}</td></tr>" for k, v in rows.items())
        return f"<table>{cells}</table>"


def checkpoint(x: str | Path | Checkpoint, *, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint: "edgehome", a Hugging Face folder, "standin:NAME", or a hub id such as "org/model".

    Config, tokenizer and the headers of the weights are checked; raises LabkitError saying what is wrong.
    """
    if isinstance(x, Checkpoint):
        return x
    if str(x) == "edgehome":
        return open_checkpoint(house_folder(), name="edgehome")
    folder = Path(x).expanduser()
    if folder.exists():
        return open_checkpoint(folder.resolve())
    if str(x).startswith("standin:"):
        from labkit.standin import standin

        return standin(str(x).removeprefix("standin:"))
    from labkit import hub

    if hub.looks_like_id(str(x)):
        return hub.fetch(str(x), revision)
    raise LabkitError(
        f"No checkpoint {str(x)!r}; expected edgehome, a folder that exists, standin:NAME (see `labkit models`), "
        "or a hub id such as Qwen/Qwen3-0.6B."
    )


def house_folder() -> Path:
    """Where the shipped house model lies."""
    return Path(__file__).parent / "data" / "edgehome"


def open_checkpoint(folder: Path, *, name: str | None = None, revision: str | None = None) -> Checkpoint:
    """Check the files of a local folder and give its record; a stand-in is known by its standin.json."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LabkitError(f"{folder} is not a folder; expected one with config.json, tokenizer.json and safetensors.")
    config = read_json(folder / "config.json", "Checkpoint config")
    mark = folder / "standin.json"
    found = Checkpoint(folder, name or folder.name, revision or "", config, trained=not mark.exists())
    _check(found)
    if not revision:  # a second record would read tokenizer, headers and contents again
        object.__setattr__(found, "revision", found.fingerprint[:12])
    return found


def _check(found: Checkpoint) -> None:
    if not isinstance(found.config.get("vocab_size"), int):
        raise LabkitError(f"{found.path / 'config.json'} has no vocab_size; expected the config of a text model.")
    _check_tokenizer(found)
    tensors = found.tensors()
    try:
        expected = _shapes.shapes(found.config) or {}
    except (KeyError, TypeError) as error:
        raise LabkitError(f"{found.path / 'config.json'} lacks {error}, which {found.architecture} needs.") from None
    for name, shape in expected.items():
        if name not in tensors:
            raise LabkitError(f"Tensor {name!r} is missing from {found.path}; a {found.architecture} needs it.")
        if tensors[name].shape != shape:
            raise LabkitError(
                f"Tensor {name!r} in {found.path} has shape {tensors[name].shape}; config.json says {shape}."
            )


def _check_tokenizer(found: Checkpoint) -> None:
    ids = found.tokenizer.get_vocab(with_added_tokens=True).values()
    largest = max(ids, default=-1)
    if largest >= found.vocab_size:
        raise LabkitError(
            f"The tokenizer of {found.path} has ids up to {largest}, but the embedding has {found.vocab_size} rows; "
            "use the tokenizer the model was trained with."
        )


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.exists():
        raise LabkitError(f"{file} is missing; expected a Hugging Face tokenizer beside the weights.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise LabkitError(f"{file} is damaged ({error}); expected a Hugging Face tokenizer.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_finite(found: Checkpoint) -> None:
    """Read every weight once; raise LabkitError at the first tensor with NaN or infinity. Stand-ins have none."""
    for view in found.tensors().values() if found.trained else ():
        if not is_finite(view):
            raise LabkitError(
                f"Tensor {view.name!r} in {view.file} holds NaN or infinite weights; "
                "a model built from it would answer nonsense. Get the checkpoint again."
            )


def _digest_file(file: Path, digest: Any) -> None:
    total = file.stat().st_size
    with open(file, "rb") as stream:
        if total <= WHOLE:
            digest.update(stream.read())
            return
        digest.update(stream.read(1_000_000))  # the header, for any sane model
        for place in range(64):
            stream.seek(place * (total - 4096) // 63)
            digest.update(stream.read(4096))
