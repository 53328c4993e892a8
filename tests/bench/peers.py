"""The real tools: built once from llama-cpp-python's source distribution against the library that labkit itself runs.

`python -m tests.bench peers` fetches the source (or takes the file or folder LABKIT_PEERS_SOURCE names), compiles llama-bench,
llama-perplexity and llama-quantize against the installed shared libraries, and keeps everything outside the repository, in
LABKIT_PEERS (default: the user's cache folder). Both sides thus run the very same libllama and libggml.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

from labkit import host
from labkit.types import LabkitError

TOOLS = {"llama-bench": "llama-bench", "llama-perplexity": "perplexity", "llama-quantize": "quantize"}
VERSION = "0.3.36"


def place() -> Path:
    """Where the peers are kept."""
    import platformdirs

    chosen = os.environ.get("LABKIT_PEERS")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("labkit-peers", appauthor=False))


def tool(name: str) -> Path:
    """A built tool; LabkitError names the command that builds it."""
    file = place() / "bin" / name
    if not file.exists():
        raise LabkitError(f"{name} is not in {file.parent}; build the peers once:  python -m tests.bench peers")
    return file


def source() -> Path:
    """llama.cpp's tree inside the unpacked source distribution."""
    found = sorted(place().glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not found:
        raise LabkitError(f"llama.cpp's source is not in {place()}; fetch it once:  python -m tests.bench peers")
    return found[-1]


def libraries() -> Path:
    """The folder of shared libraries that llama-cpp-python installed, with libllama-common among them."""
    try:
        files = metadata.distribution("llama-cpp-python").files or []
    except metadata.PackageNotFoundError:
        raise LabkitError('llama-cpp-python is not installed. Try:  pip install "labkit[llamacpp]"') from None
    for file in files:
        if file.name.startswith("libllama-common."):
            return Path(file.locate()).parent
    raise LabkitError("llama-cpp-python came without libllama-common; install it from source, as pip does on Linux.")


def environment(threads: int | None = None) -> dict[str, str]:
    """For a peer's process: the same library, threads that wait as those of labkit's timing processes do."""
    more = {"LD_LIBRARY_PATH": str(libraries())} | host.waiting("short")
    return os.environ | more | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def build() -> list[Path]:
    """Fetch, unpack and compile what is missing, one file at a time; the tools."""
    (place() / "bin").mkdir(parents=True, exist_ok=True)
    _unpack()
    return [_compile(name, folder) for name, folder in TOOLS.items()]


def _unpack() -> None:
    given = os.environ.get("LABKIT_PEERS_SOURCE")
    if list(place().glob("llama_cpp_python-*/vendor/llama.cpp")):
        return
    archive = Path(given) if given else place() / f"llama_cpp_python-{VERSION}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-binary", ":all:", "--no-deps"]
        subprocess.run([*command, f"llama-cpp-python=={VERSION}", "-d", str(place())], check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(place(), filter="data")


def _compile(name: str, folder: str) -> Path:
    root, libs, target = source(), libraries(), place() / "bin" / name
    if target.exists():
        return target
    files = [str(root / "tools" / folder / file) for file in (f"{folder}.cpp", "main.cpp")]
    include = [f"-I{root / part}" for part in ("common", "include", "ggml/include", "vendor")]
    link = [f"-L{libs}", "-lllama-common", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath-link,{libs}", "-pthread"]
    beside = target.with_suffix(".part")
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-DNDEBUG", *include, *files, "-o", str(beside), *link]
    subprocess.run(command, check=True)
    beside.replace(target)
    return target


def answer(command: list[str], *, threads: int | None = None, seconds: float = 3600) -> str:
    """Standard output and error of a peer; LabkitError with its last words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment(threads), timeout=seconds)
    if done.returncode:
        tail = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise LabkitError(f"{Path(command[0]).name} ended with status {done.returncode}: {tail}")
    return done.stdout + "\n" + done.stderr
