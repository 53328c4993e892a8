"""Make the reference figures of this folder with llama.cpp's own tool, run on the tests' tiny checkpoint.

    python tests/measure/reference/make.py PATH_TO_LLAMA_PERPLEXITY

The tool is not in the wheel; it compiles from llama-cpp-python's source distribution against the wheel's libraries:
g++ -O2 -std=c++17 -Icommon -Iinclude -Iggml/include -Ivendor tools/perplexity/*.cpp -o llama-perplexity \
    -L"$LIB" -lllama-common -lllama -lggml -lggml-base -lpthread -Wl,-rpath,"$LIB"      (LIB: site-packages/lib)
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
SETTINGS = ["--no-escape", "-t", "1", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-repack", "-ngl", "0"]
NUMBER = r"(-?\d+\.\d+)"


def main(tool: str) -> None:
    import tiny_checkpoint

    import labkit

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = work / "text.txt"
        text.write_text(" ".join(tiny_checkpoint.TEXT) * 12)
        tiny = tiny_checkpoint.write_llama(work / "tiny")
        models = {}
        for precision in ("f32", "q8_0", "q2_k"):
            artifact = labkit.build(tiny, labkit.Recipe("llamacpp", precision), out=work / precision)
            models[precision] = next(artifact.path.glob("*.gguf"))
        base, small = work / "base.bin", HERE / "base_16x2.bin"

        def run(precision: str, window: int, chunks: int, *more: str) -> str:
            given = [tool, "-m", models[precision], "-f", text, "-c", window, "--chunks", chunks, *SETTINGS, *more]
            done = subprocess.run(list(map(str, given)), capture_output=True, text=True, check=True)
            return done.stdout + done.stderr

        run("f32", 16, 2, "--kl-divergence-base", str(small))
        said = {"f32": run("f32", 64, 8, "--kl-divergence-base", str(base))}
        for precision in ("q8_0", "q2_k"):
            said[precision] = run(precision, 64, 8, "--kl-divergence-base", str(base), "--kl-divergence")
    found = {precision: figures(text) for precision, text in said.items()}
    about = {"llama-cpp-python": metadata.version("llama-cpp-python"), "window": 64, "chunks": 8}
    (HERE / "figures.json").write_text(
        json.dumps(about | {"figures": found}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def figures(said: str) -> dict[str, float]:
    """The numbers a run printed, by the words before them."""
    final = re.search(rf"PPL = {NUMBER} \+/- {NUMBER}", said)
    if final:
        return {"PPL": float(final.group(1)), "PPL error": float(final.group(2))}
    found = {}
    for line in said[said.index("=====") :].splitlines():
        if " I " in line:  # a line of the log, not of the figures
            continue
        numbers = re.findall(NUMBER, line.split(":", 1)[-1])
        if ":" in line and numbers:
            name = re.sub(r"\s+", " ", line.split(":", 1)[0]).strip()
            found[name] = float(numbers[0])
            if len(numbers) > 1:
                found[f"{name} error"] = float(numbers[1])
    return found


if __name__ == "__main__":
    main(sys.argv[1])
