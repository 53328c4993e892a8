"""OpenVINO GenAI's pipeline with pages and continuous batches, watched step by step: a real server's inside, without HTTP.

    watched = Batching("model.gguf", slots=4, blocks=32)
    trace = watched.run(prompts, lengths)         # who ran in each step, how many blocks were taken, and the answers

It opens a GGUF as it is (of the float types: f16 only). Float32 arithmetic and cache, so that answers can be compared. Pages hold BLOCK tokens on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from labkit.types import LabkitError, NotInstalled

BLOCK = 32  # tokens a page holds in OpenVINO's CPU plugin
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


@dataclass
class Trace:
    """One entry a step: requests that took part, blocks taken afterwards, seconds. And the ids that were written."""

    scheduled: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)


class Batching:
    """The pipeline on a GGUF: at most `slots` requests at once, `blocks` pages; `prefix`: pages of equal beginnings are shared."""

    def __init__(self, path: str | Path, slots: int, blocks: int, *, prefix: bool = False):
        try:
            import openvino_genai as genai
        except ImportError:
            raise NotInstalled('OpenVINO GenAI is not installed. Try:  pip install "labkit[openvino]"') from None
        how = genai.SchedulerConfig()
        how.max_num_seqs, how.num_kv_blocks, how.enable_prefix_caching = slots, blocks, prefix
        how.dynamic_split_fuse = False  # prompts are read in steps of their own
        how.max_num_batched_tokens = blocks * BLOCK
        self.blocks, self._asked = blocks, 0
        try:
            self._pipeline = genai.ContinuousBatchingPipeline(str(path), how, "CPU", EXACT, {})
        except RuntimeError as error:
            raise LabkitError(f"OpenVINO cannot open {path}: {str(error).splitlines()[-1]}") from None

    def run(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Trace:
        """Hand in every request at once and step until all are answered, greedily and without minding end-of-text."""
        handles, trace = [self._ask(ids, n) for ids, n in zip(prompts, lengths, strict=True)], Trace()
        while self._pipeline.has_non_finished_requests():
            begin = time.perf_counter()
            self._pipeline.step()
            trace.seconds.append(time.perf_counter() - begin)
            seen = self._pipeline.get_metrics()
            trace.scheduled.append(seen.scheduled_requests)
            trace.blocks.append(round(seen.cache_usage / 100 * self.blocks))
        trace.ids = [list(handle.read_all()[0].generated_ids) for handle in handles]
        return trace

    def _ask(self, ids: Sequence[int], new: int):
        import openvino as ov
        import openvino_genai as genai

        how = genai.GenerationConfig()
        how.max_new_tokens, how.ignore_eos, how.do_sample = new, True, False
        self._asked += 1
        return self._pipeline.add_request(self._asked, ov.Tensor(np.array([ids], dtype=np.int64)), how)
