"""A loaded IR: logits from the OpenVINO runtime, generation from OpenVINO GenAI."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from labkit._signals import signal_stack_kept
from labkit.engines import _nncf
from labkit.engines._tokens import checked
from labkit.types import Artifact, LabkitError

MODEL = "openvino_model.xml"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def properties(exact: bool, threads: int | None) -> dict[str, Any]:
    """What to ask of the CPU plugin; nothing where its own choice is wanted."""
    found: dict[str, Any] = dict(EXACT) if exact else {}
    if threads is not None:
        if threads < 1:
            raise LabkitError(f"threads must be at least 1; {threads} was given.")
        found["INFERENCE_NUM_THREADS"] = threads
    return found


@cache
def core() -> Any:
    """The one Core of this process, its CPU plugin loaded; see `signal_stack_kept` for why not one for every model."""
    import openvino as ov

    one = ov.Core()
    with signal_stack_kept():
        one.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin
    return one


@signal_stack_kept()
def open_pipeline(folder: Path, wanted: Mapping[str, Any], backend: str) -> Any:
    """The IR in `folder` as an `openvino_genai.LLMPipeline`."""
    import openvino_genai

    # The SDPA backend keeps no cache across prompts: a repeated prompt costs what it cost the first time.
    return openvino_genai.LLMPipeline(str(folder), "CPU", ATTENTION_BACKEND=backend, **wanted)


class Runner:
    """Logits come from the OpenVINO runtime, generation from OpenVINO GenAI: two compiled copies of one IR.

    Exact runs are about logits and timed ones about generation, so that copy is made at once and the other when needed.
    """

    def __init__(self, artifact: Artifact, exact: bool, threads: int | None):
        self._artifact = artifact
        self._wanted = properties(exact, threads)
        self._limits = artifact.checkpoint.vocab_size, artifact.checkpoint.context
        self._closed = False
        self.settings = self._effective(exact)
        _ = self._request if exact else self._generator

    @cached_property
    def _request(self) -> Any:
        model = core().compile_model(self._artifact.path / MODEL, "CPU", self._wanted)
        return model.create_infer_request()

    @cached_property
    def _generator(self) -> Any:
        return open_pipeline(self._artifact.path, self._wanted, "SDPA")

    def _effective(self, exact: bool) -> dict[str, Any]:
        """Properties as the plugin reports them, read from a one-node model compiled with the same wishes."""
        import openvino as ov
        from openvino import opset15 as op

        x = op.parameter([1], ov.Type.f32)
        compiled = core().compile_model(ov.Model([op.relu(x)], [x], "probe"), "CPU", self._wanted)

        def read(name: str) -> str:
            value = compiled.get_property(name)
            return value.get_type_name() if hasattr(value, "get_type_name") else str(value)

        return {
            "device": "CPU",
            "exact": exact,
            "threads": int(read("INFERENCE_NUM_THREADS")),
            "inference_precision": read("INFERENCE_PRECISION_HINT"),
            "kv_cache": read("KV_CACHE_PRECISION"),
            "dynamic_quantization_group_size": int(read("DYNAMIC_QUANTIZATION_GROUP_SIZE")),
            "performance_hint": read("PERFORMANCE_HINT"),
            "streams": int(read("NUM_STREAMS")),
            "attention_backend": "SDPA",
            "prefix_caching": False,
        }

    def _checked(self, tokens: Sequence[int], more: int = 0) -> np.ndarray:
        if self._closed:
            raise LabkitError("This runner is closed; load the artifact again.")
        return checked(tokens, *self._limits, more)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits for every position, (T, V) float32; row i predicts token i + 1."""
        ids = self._checked(tokens)
        self._request.reset_state()
        found = self._request.infer(_nncf.inputs(ids), share_inputs=True)["logits"]
        return np.array(found[0], dtype=np.float32)

    def generate(self, tokens: Sequence[int], max_new: int) -> Iterator[int]:
        """Greedy continuation of exactly `max_new` ids; each is yielded as soon as GenAI has it."""
        ids = self._checked(tokens, max_new)
        return _stream(self._generator, ids, max_new) if max_new > 0 else iter(())

    def close(self) -> None:
        """Free the compiled models. Safe to call twice."""
        self._closed = True
        if request := self.__dict__.get("_request"):
            request.reset_state()
            request.get_compiled_model().release_memory()  # the plugin keeps activations even after the model has gone
        for name in ("_request", "_generator"):
            self.__dict__.pop(name, None)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _stream(generator: Any, ids: np.ndarray, max_new: int) -> Iterator[int]:
    """Ids as GenAI makes them, from a thread of its own; leaving the loop early stops that thread."""
    import openvino as ov
    import openvino_genai as genai

    box: queue.SimpleQueue[Any] = queue.SimpleQueue()
    left = threading.Event()

    class Feed(genai.StreamerBase):
        def write(self, token: int | list[int]) -> Any:
            for one in [token] if isinstance(token, int) else token:
                box.put(one)
            return genai.StreamingStatus.CANCEL if left.is_set() else genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def work() -> None:
        try:
            # GenAI checks its end-of-text id even when told to ignore it, and refuses a checkpoint that has none
            config = genai.GenerationConfig(max_new_tokens=max_new, ignore_eos=True, eos_token_id=0, do_sample=False)
            prompt = genai.TokenizedInputs(ov.Tensor(ids[None]), ov.Tensor(np.ones_like(ids[None])))
            generator.generate(prompt, config, streamer=Feed())
            box.put(None)
        except Exception as error:  # handed to the caller's thread, which raises it
            box.put(error)

    thread = threading.Thread(target=work, name="openvino-generate", daemon=True)
    thread.start()
    try:
        while (item := box.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        left.set()
        thread.join()
