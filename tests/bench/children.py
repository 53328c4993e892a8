"""Peers that are Python libraries: a process each, which answers a line of token ids with decode tokens/s."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
from contextlib import ExitStack
from typing import Any

from labkit.types import Artifact, LabkitError

from .harness import Arm
from .peers import environment

# As onnxruntime-genai's benchmark_e2e.py times it: append_tokens is the prefill, then generate_next_token by itself.
GENAI = textwrap.dedent("""
    import json, sys, time
    import onnxruntime_genai as og
    folder, threads, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    for line in sys.stdin:
        ids = json.loads(line)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + new + 1, min_length=len(ids) + new + 1, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        print(new / (time.perf_counter() - start), flush=True)
""")

# As OpenVINO GenAI's own metrics give it: 1000 / mean time of an output token, the first left out.
OPENVINO = textwrap.dedent("""
    import json, sys
    import numpy as np, openvino as ov, openvino_genai as og
    folder, threads, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    pipe = og.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads, ATTENTION_BACKEND="SDPA")
    config = og.GenerationConfig(max_new_tokens=new + 1, min_new_tokens=new + 1, ignore_eos=True, do_sample=False, apply_chat_template=False)
    for line in sys.stdin:
        ids = np.array([json.loads(line)], dtype=np.int64)
        found = pipe.generate(og.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config)
        print(1000 / found.perf_metrics.get_tpot().mean, flush=True)
""")

# As mlx_lm.generate makes tokens, in the dtype given: "stored" is its own default, and 16 bits on a Linux CPU.
MLX = textwrap.dedent("""
    import json, sys, time
    from pathlib import Path
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model
    folder, dtype, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
    model, _ = load_model(Path(folder))
    floats = (mx.float16, mx.bfloat16, mx.float32)
    if dtype != "stored":
        model.update(tree_map(lambda x: x.astype(getattr(mx, dtype)) if x.dtype in floats else x, model.parameters()))
    for line in sys.stdin:
        stamps = []
        for _ in generate_step(mx.array(json.loads(line)), model, max_tokens=new + 1):
            stamps.append(time.perf_counter())
        print((len(stamps) - 1) / (stamps[-1] - stamps[0]), flush=True)
""")

# Prefill tokens/s of an MLX folder: the packed weights in float32 as mlx_lm runs them, or labkit's exact runner.
MLX_PREFILL = textwrap.dedent("""
    import json, sys, time
    from pathlib import Path
    folder, how, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if how == "exact":
        import labkit
        from labkit.build import read
        run = labkit.load(read(Path(folder)), exact=True)
        score = lambda ids: run.logits(ids)
    else:
        import mlx.core as mx
        from mlx.utils import tree_map
        from mlx_lm.utils import load_model
        model, _ = load_model(Path(folder))
        floats = (mx.float16, mx.bfloat16, mx.float32)
        model.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype in floats else x, model.parameters()))
        score = lambda ids: mx.eval(model(mx.array([ids])))
    for line in sys.stdin:
        ids = (json.loads(line) * tokens)[:tokens]
        start = time.perf_counter()
        score(ids)
        print(tokens / (time.perf_counter() - start), flush=True)
""")


class Lines:
    """A child that answers every JSON line with one line."""

    def __init__(self, command: list[str], threads: int | None = None):
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by __exit__
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, text=True, env=environment(threads), **pipe)
        self.pid = self.process.pid

    def __enter__(self) -> Lines:
        return self

    def ask(self, ids: Any) -> str:
        try:
            self.process.stdin.write(json.dumps(ids) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(10)
            self.log.seek(0)
            raise LabkitError(f"A peer ended: {' | '.join(self.log.read().strip().splitlines()[-3:])}")
        return line

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def _arm(stack: ExitStack, name: str, code: str, artifact: Artifact, setting: int | str, new: int) -> Arm:
    child = stack.enter_context(Lines([sys.executable, "-c", code, str(artifact.path), str(setting), str(new)]))
    ids = artifact.checkpoint.encode("turn on the light in the kitchen, please")[:8]
    return Arm(name, lambda: float(child.ask(ids)), (child.pid,))


def genai_arm(stack: ExitStack, artifact: Artifact, threads: int, new: int) -> Arm:
    """ONNX Runtime GenAI's generator loop on the same folder."""
    return _arm(stack, "onnxruntime-genai", GENAI, artifact, threads, new)


def openvino_arm(stack: ExitStack, artifact: Artifact, threads: int, new: int) -> Arm:
    """OpenVINO GenAI's pipeline on the same folder, at its own default precision."""
    return _arm(stack, "openvino-genai", OPENVINO, artifact, threads, new)


def mlx_arm(stack: ExitStack, artifact: Artifact, threads: int, new: int, dtype: str = "float32") -> Arm:
    """mlx_lm's own generation on the same folder; labkit computes in float32 where there is no Apple GPU."""
    return _arm(stack, f"mlx-lm {dtype}", MLX, artifact, dtype, new)


def mlx_prefill_arm(stack: ExitStack, artifact: Artifact, how: str) -> Arm:
    """Prefill of half a context: `exact` by labkit's runner for quality, `packed` by mlx_lm in float32."""
    return _arm(stack, f"prefill {how}", MLX_PREFILL, artifact, how, artifact.checkpoint.context // 2)
