"""The same question from five languages: where each client's source is, what it needs, how it is built and run.

    clients.available()                               # language -> the tool that was found, or None
    clients.ask("node", server.url, "Turn on the lamp")
    program = clients.build_cpp(folder)               # linked to the llama.cpp that llama-cpp-python brought

Python, Node.js, C# and curl speak to a server over HTTP; C++ opens the model itself through llama.cpp's C API.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from labkit.types import LabkitError

FOLDER = Path(__file__).parent / "data" / "clients"
SOURCES = {
    "python": "python/chat.py", "curl": "curl/chat.sh", "node": "node/chat.mjs", "csharp": "csharp/Chat.cs", "cpp": "cpp/complete.cpp",
}  # fmt: skip
TOOLS = {"python": (), "curl": ("curl",), "node": ("node",), "csharp": ("dotnet", "mcs"), "cpp": ("g++", "c++", "clang++")}
OVER_HTTP = ("python", "curl", "node", "csharp")
PAIRS = {")": "(", "]": "[", "}": "{"}
STRUCTURES = ("llama_model_params", "llama_context_params", "llama_batch")  # what is passed by value


def source(language: str) -> str:
    """The client's program text."""
    return (FOLDER / SOURCES[language]).read_text(encoding="utf-8")


def available() -> dict[str, str | None]:
    """Language -> the first of its tools that is on the path, None when there is none."""
    found = {language: next((path for tool in tools if (path := shutil.which(tool))), None) for language, tools in TOOLS.items()}
    if found["csharp"] and Path(found["csharp"]).stem == "mcs" and not shutil.which("mono"):  # it could be compiled, but not run
        found["csharp"] = None
    return {**found, "python": sys.executable}


def answers(url: str, question: str, folder: Path) -> dict[str, str]:
    """Language -> what its client printed, or the sentence that says why there is no answer; over HTTP only."""
    found = {}
    for language in OVER_HTTP:
        try:
            found[language] = ask(language, url, question, folder)
        except LabkitError as error:
            found[language] = str(error)
    return found


def ask(language: str, url: str, question: str, folder: Path | None = None) -> str:
    """Run a client of OVER_HTTP against a server; what it printed. `folder`: where C# may be compiled.

    LabkitError when the tool is absent or the client fails, with the last line it wrote.
    """
    tool = available().get(language)
    if language not in OVER_HTTP or tool is None:
        raise LabkitError(f"{language} needs {' or '.join(TOOLS.get(language, ()))} on the path; it is not there.")
    if language == "curl":
        said = _run(["sh", str(FOLDER / SOURCES["curl"]), url, json.dumps(_body(question))])
        return json.loads(said)["choices"][0]["message"]["content"].strip()
    if language == "csharp":
        return _run([*build_csharp(folder or Path.cwd()), url, question])
    return _run([tool, str(FOLDER / SOURCES[language]), url, question])


def _body(question: str) -> dict[str, Any]:
    return {"model": "edgehome", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 64}


def post(url: str, question: str) -> str:
    """The same request from this very process: for timing a server without the start of a client."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(_body(question)).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business with loopback
    with opener.open(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]["message"]["content"].strip()


def at_once(url: str, question: str, count: int) -> list[float]:
    """Seconds until each of `count` requests that start together was answered, ascending."""
    begin = time.perf_counter()

    def one(_: int) -> float:
        post(url, question)
        return time.perf_counter() - begin

    with ThreadPoolExecutor(count) as pool:
        return sorted(pool.map(one, range(count)))


def _run(command: Sequence[str], seconds: float = 120) -> str:
    without_proxy = {k: v for k, v in os.environ.items() if k.lower() not in ("http_proxy", "https_proxy", "all_proxy")}
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, encoding="utf-8", timeout=seconds, env=without_proxy, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise LabkitError(f"{Path(command[0]).name} did not end within {seconds:g} s.") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it wrote nothing").splitlines()[-1]
        raise LabkitError(f"{Path(command[0]).name} ended with status {done.returncode}: {last[:300]}")
    return done.stdout.strip()


def build_csharp(folder: Path) -> list[str]:
    """Compile the C# client into `folder` with .NET or Mono; the command that runs it."""
    tool, file = available()["csharp"], FOLDER / SOURCES["csharp"]
    if tool is None:
        raise LabkitError("csharp needs dotnet or mcs on the path; it is not there.")
    if Path(tool).stem == "dotnet":
        for one in (file, file.with_suffix(".csproj")):
            shutil.copyfile(one, folder / one.name)
        _run([tool, "build", str(folder / "Chat.csproj"), "--nologo", "-c", "Release", "-o", str(folder / "csharp")], 300)
        return [tool, str(folder / "csharp" / "Chat.dll")]
    program = folder / "Chat.exe"
    _run([tool, "-langversion:7", "-r:System.Net.Http", "-r:System.Runtime.Serialization", f"-out:{program}", str(file)])
    return ["mono", str(program)]


def headers() -> Path | None:
    """The folder of llama.h that llama-cpp-python installed, None when it did not."""
    from labkit.engines import _ggml

    base = Path(_ggml.library()._base_path)  # site-packages/llama_cpp/lib
    places = (base.parents[1] / "include", base.parent / "include", base.parents[1] / "llama_cpp" / "include")
    return next((place for place in places if (place / "llama.h").exists()), None)


def build_cpp(folder: Path) -> Path:
    """Compile and link the C++ program into `folder`; its path. LabkitError when compiler or header is absent."""
    from labkit.engines import _ggml

    compiler, include = available()["cpp"], headers()
    if compiler is None:
        raise LabkitError("C++ needs g++ or clang++ on the path; it is not there.")
    if include is None:
        raise LabkitError("This llama-cpp-python came without llama.h; install it from source to compile against it.")
    library, program = str(_ggml.library()._base_path), Path(folder) / "complete"
    command = [compiler, "-std=c++17", "-O1", f"-I{include}", str(FOLDER / SOURCES["cpp"]), "-o", str(program), f"-L{library}"]
    _run([*command, "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{library}"])
    return program


def complete(program: Path, gguf: Path, prompt: str, new_tokens: int = 64, threads: int = 1) -> str:
    """What the C++ program writes after `prompt`, greedily, up to the end-of-text token."""
    return _run([str(program), str(gguf), prompt, str(new_tokens), str(threads)])


def struct_sizes(program: Path) -> dict[str, tuple[int, int]]:
    """Structure -> its size in bytes as the C++ compiler sees it, and as Python's ctypes declares it."""
    import ctypes

    from labkit.engines import _ggml

    compiled, llama = json.loads(_run([str(program), "--sizes"])), _ggml.library()
    return {name: (compiled[name], ctypes.sizeof(getattr(llama, name))) for name in STRUCTURES}


def bracket_problems(text: str) -> list[str]:
    """Brackets of a program in C's family that do not match, strings and comments left out: all that can be told without a compiler."""
    bare = re.sub(r'"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'|//[^\n]*|/\*.*?\*/', lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
    open_ones: list[tuple[str, int]] = []
    for line, row in enumerate(bare.split("\n"), 1):
        for sign in row:
            if sign in "([{":
                open_ones.append((sign, line))
            elif sign in PAIRS and (not open_ones or open_ones.pop()[0] != PAIRS[sign]):
                return [f"line {line}: {sign!r} closes nothing"]
    return [f"line {line}: {sign!r} is never closed" for sign, line in open_ones[:1]]
