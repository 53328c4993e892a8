"""The walls around a learner's process: limits, another user, no network, and a view of the disk without other work.

Linux builds up to four walls, each only where the system allows it; `walls` tries them out and the grader writes into
every record which ones stood:
 - user: a user id that owns nothing else (needs root), else a powerless id inside a user namespace;
 - files: everything read-only but the own folder; submissions, results, solutions, checks and homes covered by nothing;
 - network: a network namespace with only its own loopback;
 - processes: a process namespace, so that nothing outside can be seen or signalled and everything inside ends together.
Limits on memory, processor time, file size and number of processes hold on every POSIX system. Windows has none of these.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import site
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

LINUX = sys.platform.startswith("linux")
WALLS = ("user", "files", "network", "processes")
FIRST_USER, USERS = 61184, 4096  # the range systemd leaves to users that come and go
NOBODY = 65534
CLONE = {"files": 0x00020000, "network": 0x40000000, "processes": 0x20000000}
CLONE_NEWUSER, CLONE_NEWIPC = 0x10000000, 0x08000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 38, 36
MOUNT_SETATTR, AT_RECURSIVE, AT_FDCWD, ATTR_RDONLY = 442, 0x8000, -100, 1
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LABKIT_LANG", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Limits:
    """What one submission may take."""

    memory_bytes: int = 2_000_000_000  # of the whole process tree, and of each process
    seconds: float = 600.0  # wall time of the whole notebook; each process may use as much processor time a core
    cell_seconds: float = 120.0  # wall time of one cell
    disk_bytes: int = 1_000_000_000  # of its folder, and of each file
    processes: int = 128  # threads included


def command(folder: Path, number: int, limits: Limits, walls: Sequence[str], hidden: Iterable[Path]) -> list[str]:
    """The command that starts a learner's process in `folder`; speak to it with a `Peer` over its stdin and stdout.

    It runs this file by its path, because importing labkit would start threads, and a process with threads cannot enter
    a user namespace; and isolated (-I), because it still has our rights while the folder may hold what a learner put there.
    """
    job = {"folder": str(folder), "number": number, "limits": asdict(limits), "walls": list(walls)}
    job |= {"hidden": list(map(str, hidden)), "needed": list(map(str, _needed()))}
    return [sys.executable, "-I", __file__, json.dumps(job)]


def _needed() -> list[Path]:
    """Where the interpreter, the packages and labkit are, as named and as resolved."""
    found = [sys.prefix, sys.base_prefix, sys.executable, str(PACKAGE), *site.getsitepackages()]
    found += [path for path in sys.path if path.endswith("-packages")]
    return sorted({Path(os.path.realpath(p)) for p in found} | {Path(os.path.abspath(p)) for p in found})


def environment(folder: Path, seed: int) -> dict[str, str]:
    """What a learner's process is told: its own folders, nothing of the grader's environment that it has no use for."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    source = [str(PACKAGE.parent)] if (PACKAGE.parent / "pyproject.toml").exists() else []
    own = {
        "HOME": folder / "home", "USERPROFILE": folder / "home", "TMPDIR": folder / "tmp", "TEMP": folder / "tmp",
        "LABKIT_HOME": folder / "labkit", "LABKIT_PROGRESS": folder / "labkit/progress.json",
        "IPYTHONDIR": folder / "home/ipython", "LABKIT_NOTEBOOK": folder / "notebook.ipynb",
        "PYTHONUSERBASE": site.getuserbase(),
    }  # fmt: skip
    fixed = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "MPLBACKEND": "Agg"}
    fixed |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    paths = {"PYTHONPATH": os.pathsep.join(source)} if source else {}
    return kept | {name: str(path) for name, path in own.items()} | fixed | paths | {"LABKIT_SEED": str(seed)}


def prepare(folder: Path, number: int, walls: Sequence[str]) -> None:
    """Make the folders of `environment`, for nobody but the user the process will be."""
    for name in ("home", "tmp", "labkit", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if "user" in walls and os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, _user(number), _user(number), follow_symlinks=False)
    folder.chmod(0o700)


def adopt_orphans() -> None:
    """Make this process the parent of whatever its descendants leave behind, and end it with its own parent."""
    if LINUX:
        _libc().prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _user(number: int) -> int:
    return FIRST_USER + number % USERS


# --- inside the new process ------------------------------------------------------------------------------------------


def main(text: str) -> None:
    """Build the walls, then become the learner's process."""
    job = json.loads(text)
    folder, walls, limits = Path(job["folder"]), set(job["walls"]), Limits(**job["limits"])
    paths = {name: [Path(p) for p in job[name]] for name in ("hidden", "needed")}
    if LINUX:
        _wall_in(folder, job["number"], walls, paths, limits)
    elif os.name == "posix":
        _limit(limits, apart=False)
    os.chdir(folder / "work")
    arguments = [sys.executable, "-m", "labkit.course.grade_cells"]
    if os.name == "posix":
        os.execv(sys.executable, arguments)
    import subprocess

    sys.exit(subprocess.run(arguments).returncode)  # Windows has no exec


def _wall_in(folder: Path, number: int, walls: set[str], paths: dict[str, list[Path]], limits: Limits) -> None:
    root, user, group = os.geteuid() == 0, os.geteuid(), os.getegid()
    apart = bool(walls & CLONE.keys())
    other = "user" in walls and root
    flags = sum(CLONE[wall] for wall in walls & CLONE.keys()) | (CLONE_NEWIPC if apart else 0)
    if apart and not other:
        flags |= CLONE_NEWUSER
    if flags:
        _done("unshare", _libc().unshare(flags))
    if flags & CLONE_NEWUSER:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")
    if "processes" in walls:
        _become_first_process()
    if "network" in walls:
        _loopback_up()
    if "files" in walls:
        _cover(folder, paths["hidden"], paths["needed"], "processes" in walls)
    _limit(limits, apart or other)
    if other:
        os.setgroups([])
        os.setresgid(*[_user(number)] * 3)
        os.setresuid(*[_user(number)] * 3)
    _libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if the machine runs out of memory, this goes first


def _become_first_process() -> None:
    """Go on as process 1 of the new namespace; the process that was stays outside and ends with it."""
    child = os.fork()
    if child:
        os.close(0)
        os.close(1)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    os.setsid()  # a signal to its group must not reach outside
    _libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _loopback_up() -> None:
    """A new network namespace has a loopback that is down; labs that talk to their own server need it."""
    import fcntl
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        fcntl.ioctl(line, 0x8914, struct.pack("16sh22x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING


def _cover(folder: Path, hidden: Sequence[Path], needed: Sequence[Path], own_processes: bool) -> None:
    """Mount nothing over what must not be read, make the rest read-only, and bring the own folder back, writable."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    own = os.open(folder, os.O_RDONLY)
    for path in _to_cover(hidden, needed):
        if path.is_dir():
            _mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
        elif path.exists():
            _mount(os.devnull, path, None, MS_BIND)
    folder.mkdir(parents=True, exist_ok=True)  # it stands there, or under a cover
    _mount(f"/proc/self/fd/{own}", folder, None, MS_BIND)
    if Path("/dev/shm").is_dir():
        _mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "size=64m,mode=1777")
    if own_processes:
        _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _set_read_only("/", everything=True)
    for path in (folder, Path("/dev/shm")):
        if path.is_dir():
            _set_read_only(path, off=True)
    os.close(own)


def _to_cover(hidden: Sequence[Path], needed: Sequence[Path]) -> list[Path]:
    """The paths to cover: what is `hidden`, without the interpreter and packages that may lie in it."""
    found: list[Path] = []

    def visit(path: Path) -> None:
        if not any(path == one or path in one.parents for one in needed):
            found.append(path)
        elif path not in needed:
            with contextlib.suppress(OSError):
                for child in sorted(path.iterdir()):
                    if not child.is_symlink():
                        visit(child)

    for path in hidden:
        visit(Path(os.path.realpath(path)))
    return list(dict.fromkeys(found))


def _limit(limits: Limits, apart: bool) -> None:
    """Resource limits of this process and its children. `apart`: the process count starts at nothing for this user."""
    import resource

    def at_most(kind: str, value: int) -> None:
        number = getattr(resource, kind, None)
        if number is None:
            return
        _, hard = resource.getrlimit(number)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(number, (value, value))

    at_most("RLIMIT_DATA" if LINUX else "RLIMIT_AS", limits.memory_bytes)
    at_most("RLIMIT_CPU", int(limits.seconds * (os.cpu_count() or 1)) + 1)
    at_most("RLIMIT_FSIZE", limits.disk_bytes)
    at_most("RLIMIT_NPROC", limits.processes + (0 if apart else _threads_of_mine()))
    at_most("RLIMIT_NOFILE", 1024)
    at_most("RLIMIT_CORE", 0)


def _threads_of_mine() -> int:
    """Processes and threads this user has now; a limit on their number counts them all."""
    import psutil

    total = 0
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            total += one.num_threads() if one.uids().real == os.getuid() else 0
    return total


def _mount(source: Any, target: str | Path, kind: str | None, flags: int, options: str | None = None) -> None:
    names = [None if x is None else str(x).encode() for x in (source, target, kind)]
    _done(f"mount {target}", _libc().mount(*names, ctypes.c_ulong(flags), None if options is None else options.encode()))


def _set_read_only(path: str | Path, *, everything: bool = False, off: bool = False) -> None:
    change = struct.pack("QQQQ", 0 if off else ATTR_RDONLY, ATTR_RDONLY if off else 0, 0, 0)
    flags = AT_RECURSIVE if everything else 0
    answer = _libc().syscall(MOUNT_SETATTR, AT_FDCWD, str(path).encode(), flags, change, len(change))
    _done(f"mount_setattr {path}", answer)


def _done(what: str, answer: int) -> None:
    if answer != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


# --- which walls stand here ------------------------------------------------------------------------------------------


def walls(base: Path, limits: Limits, hidden: Sequence[Path]) -> tuple[str, ...]:
    """The walls that this system lets us build, found by building them around a process that only says hello."""
    if not LINUX:
        return ()
    wanted = [wall for wall in WALLS if wall != "user" or os.geteuid() == 0]
    if _stands(base, wanted, limits, hidden):
        return tuple(wanted)
    chosen: list[str] = []
    for wall in wanted:
        if _stands(base, [*chosen, wall], limits, hidden):
            chosen.append(wall)
    return tuple(chosen)


def _stands(base: Path, wanted: Sequence[str], limits: Limits, hidden: Sequence[Path]) -> bool:
    import shutil
    import subprocess

    from labkit.course.grade_wire import Broken, Peer

    folder = base / "trial"
    prepare(folder, 0, wanted)
    process = subprocess.Popen(
        command(folder, 0, limits, wanted, hidden), env=environment(folder, 0), cwd=folder,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        Peer(process.stdout, process.stdin).ask("ready", seconds=60)
        return True
    except Broken:
        return False
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):  # what was not sent any more
            process.stdin.close()
        shutil.rmtree(folder, ignore_errors=True)


def told(standing: Sequence[str]) -> list[str]:
    """One sentence for each wall that is missing."""
    missing = {
        "user": "Submissions ran under the grader's own user id; another needs root and a Python that every user may run.",
        "files": "Other submissions could be read, and files of the user who grades changed: mounts are not allowed here.",
        "network": "The network could not be cut.",
        "processes": "Other processes of this machine could be seen.",
    }
    return [text for wall, text in missing.items() if wall not in standing]


if __name__ == "__main__":
    main(sys.argv[1])
