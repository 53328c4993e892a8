"""A model that Foundry Local runs, behind labkit's gateway: the runner, the folder it needs, and the command that serves it."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit.checkpoint import Checkpoint
from labkit.i18n import tr
from labkit.serve import foundry
from labkit.types import Artifact, LabkitError


class FoundryRunner:
    """A registered model as a `Runner`, so that the gateway can serve it: token ids in, token ids out, greedy only.

    The gateway renders the chat template, so the model is registered with a template that adds nothing (`raw_folder`). The
    runtime gives text, no ids: each piece is encoded again. That spells the same text, at times in other tokens.
    """

    def __init__(self, folder: Path | str, checkpoint: Checkpoint, threads: int | None = None):
        self.checkpoint, self._stack = checkpoint, contextlib.ExitStack()
        try:
            raw = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="labkit-foundry-raw-")))
            self._local = self._stack.enter_context(foundry.host(threads))
            self._model = self._local.register(raw_folder(folder, raw / "model"), "raw")
            self._local.load(self._model)
        except BaseException:
            self.close()
            raise
        self.settings: Mapping[str, Any] = {"runtime": f"{foundry.PACKAGE} {foundry.version()}", "greedy": True, "threads": threads}

    def logits(self, tokens: Sequence[int]) -> Any:
        raise LabkitError(tr("Foundry Local gives text and no logits; ask for temperature 0, or measure with another engine."))

    def generate(self, tokens: Sequence[int], max_new: int) -> Iterator[int]:
        """Greedy ids until the model ends its turn (then an end-of-text id) or there are `max_new`."""
        search = {"max_output_tokens": max_new, "do_sample": False}
        prompt = [{"role": "user", "content": self.checkpoint.decode(tokens)}]
        if (read := self._local.budget(self._model, prompt, **search).prompt_tokens) != len(tokens):
            raise LabkitError(tr("Foundry Local reads {read} tokens where {given} were given; its folder has another tokenizer.",
                                 read=read, given=len(tokens)))  # fmt: skip
        pieces = self._local.stream(self._model, prompt, **search)
        made = 0
        with contextlib.closing(pieces):
            while made < max_new:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    if end.value.reason == "stop" and self.checkpoint.eos_ids:
                        yield self.checkpoint.eos_ids[0]
                    return
                for token in self.checkpoint.encode(piece, special=False):
                    made += 1
                    yield token

    def memory(self) -> int:
        """Resident bytes of the process that holds the model."""
        return self._local.memory()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> FoundryRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def gateway_command(artifact: Artifact, *, foundry: bool = True, queue: int = 64, threads: int = 1) -> list[str]:
    """A command for `supervisor.supervise`: labkit's gateway over an artifact, opened by Foundry Local or by its own engine.

    The API keys are read from the variable LABKIT_API_KEYS, as `labkit serve` does.
    """
    given = [str(artifact.path), "{port}", str(queue), str(threads), "foundry" if foundry else "engine"]
    return [sys.executable, "-m", "labkit.serve.foundry_gateway", *given]


def _serve(folder: str, port: str, queue: str, threads: str, by: str) -> int:
    from labkit.build import load, read
    from labkit.serve import command
    from labkit.serve.gateway import gateway
    from labkit.serve.guard import Limits

    found, cores = read(Path(folder)), int(threads)
    opener = {"foundry": lambda: FoundryRunner(found.path, found.checkpoint, cores), "engine": lambda: load(found, threads=cores)}[by]
    app = gateway(found, limits=Limits(queue=int(queue)), keys=command.read_keys(None), open_runner=opener)
    return command.run(app, "127.0.0.1", int(port))


def raw_folder(folder: Path | str, out: Path | str) -> Path:
    """The same GenAI folder with a chat template that passes one message through unchanged.

    The weights are copied: with a second name on its file, the artifact itself could no longer be read by the onnx package.
    """
    folder, out = Path(folder), Path(out)
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file() and file.name not in ("tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(file, out / file.name)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = "{{ messages[0]['content'] }}"
    (out / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return out


if __name__ == "__main__":
    sys.exit(_serve(*sys.argv[1:]))
