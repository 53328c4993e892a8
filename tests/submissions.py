"""Submissions for a small lab, written by a script: `python tests/submissions.py FOLDER [COUNT]`. Good and hostile ones mixed.

Each kind is a function from the learner's number to a notebook (or raw text) and the points it must get.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ANSWERS = {
    "00.1": ("megabytes", "def megabytes(weights, bits):\n    return weights * bits / 8 / 1e6"),
    "00.2": ("bits_per_weight", "def bits_per_weight(stored, weights):\n    return 8 * stored / weights"),
    "00.5": ("nearest", "import numpy as np\ndef nearest(values, step):\n    return np.round(values / step) * step"),
}
START = ['profile: str = "ci"  # how long', 'import labkit\nlab = labkit.start("00")']


def check(name: str) -> str:
    return f'labkit.check("{name}", {ANSWERS[name][0]})'


def solved(*names: str) -> list[str]:
    """Cells of a submission that solves the named exercises and left the others as they were."""
    cells = list(START)
    for name, (function, source) in ANSWERS.items():
        stub = f"def {function}(a, b):\n    ..."
        cells += [source if name in names else stub, check(name)]
    return cells


def notebook(cells: Sequence[str], *, ids: bool = True, **metadata: object) -> str:
    """The text of a notebook of lab 00; the first cell is the parameters cell."""
    made = []
    for i, source in enumerate(cells):
        cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]} if i == 0 else {}, "source": source}
        made.append(cell | {"outputs": [], "execution_count": None} | ({"id": f"c{i}"} if ids else {}))
    about = {"labkit": {"lab": "00", "version": "0.1.0"}} | metadata
    return json.dumps({"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5})


ALL = tuple(ANSWERS)
FORGED = """
import json, labkit
from labkit.course import exercises, compare
exercises.judge = lambda name, answer: exercises.Verdict(name, "passed", "")
exercises.check = exercises.judge
labkit.check = exercises.judge
compare.close = compare.same = compare.function = lambda *a, **k: None
class Equal:
    def __eq__(self, other): return True
    def __float__(self): return 1.0
    def __reduce__(self): return (print, ("unpickled",))
print("00.1: passed"); print(json.dumps({"exercises": {"00.1": "passed"}}))
"""
SPEAKS = """
import os, struct, json
for n in range(1, 60):
    text = json.dumps({"reply": n, "value": ["00.1", {"array": ["<f8", [], "AAAAAAAA8D8="]}, ""]}).encode()
    for fd in range(3, 32):
        try: os.write(fd, struct.pack("<I", len(text)) + text)
        except OSError: pass
"""
LIES = """
import labkit.course.grade_cells as side
class Odd(dict):
    pass
def lie(self, source, seconds):
    return {answer}
side.Cells.run = lie
import gc
from labkit.course.grade_wire import Peer
for peer in [o for o in gc.get_objects() if isinstance(o, Peer)]:
    peer._handlers["run"] = lambda source, seconds: {answer}
"""
SNOOP = """
import os, labkit
found, package = [], os.path.dirname(labkit.__file__)
for place in [{places!r}, package, os.path.join(os.path.dirname(package), "tests")]:
    for top, _, names in os.walk(place):
        found += [os.path.join(top, n) for n in names if n.endswith((".ipynb", "grades.csv")) or top.endswith("checks")]
print("SEEN", sorted(found)[:20])
"""


def kinds(places: str = "/tmp") -> dict[str, tuple[Callable[[], str], int]]:
    """Name of the kind -> (its text, the points it deserves). `places`: folders a prying submission looks through."""
    good = solved(*ALL)
    after = {
        "hangs": "while True: pass",
        "hangs_stubborn": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    }
    after |= {
        "forks": "import os\nwhile True: os.fork()",
        "forks_away": "import os, time\nfor _ in range(20):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(600)",
        "eats_memory": "hoard = []\nwhile True: hoard.append(bytearray(b'x') * 50_000_000)",
        "eats_memory_in_children": "import os, time\nfor _ in range(30):\n    if os.fork() == 0:\n"
        "        x = bytearray(b'x') * 100_000_000\n        time.sleep(60)\ntime.sleep(20)",
        "deletes": "import shutil, os\nshutil.rmtree('.', ignore_errors=True)\nshutil.rmtree(os.path.expanduser('~'), ignore_errors=True)",
        "prints": "for _ in range(1000): print('x' * 1_000_000)",
        "prints_to_descriptor": "import os\nfor _ in range(200): os.write(1, b'x' * 1_000_000)",
        "exits": "import os\nos._exit(0)", "quits": "import sys\nsys.exit(3)", "segfaults": "import ctypes\nctypes.string_at(0)",
        "fills_disk": "f = open('big', 'wb')\nwhile True: f.write(b'x' * 10_000_000)",
        "closes_the_line": "import os\nos.closerange(0, 256)",
        "kills": "import os, signal\ntry: os.kill(os.getppid(), signal.SIGKILL)\nexcept OSError: pass\ntry: os.kill(-1, signal.SIGTERM)\nexcept OSError: pass",
    }  # fmt: skip
    found: dict[str, tuple[Callable[[], str], int]] = {
        "good": (lambda: notebook(good), 3),
        "half": (lambda: notebook(solved("00.2")), 1),
        "untouched": (lambda: notebook(solved()), 0),
        "wrong": (lambda: notebook([*START, "def megabytes(w, b):\n    return w * b", check("00.1")]), 0),
        "not_json": (lambda: "{ this is not JSON", 0),
        "empty": (lambda: "", 0),
        "wrong_form": (lambda: '{"cells": {"a": 1}}', 0),
        "deep": (lambda: "[" * 200_000, 0),
        "copied_cells": (lambda: notebook([*good, *good[2:]]), 3),
        "same_ids": (lambda: notebook(good).replace('"id": "c3"', '"id": "c2"'), 3),
        "no_ids": (lambda: notebook(good, ids=False), 3),
        "reordered": (lambda: notebook([*START, check("00.5"), check("00.1"), *[ANSWERS[n][1] for n in reversed(ALL)]]), 3),
        "needs_later_cell": (lambda: notebook([*START, "megabytes = later", check("00.1"), "later = lambda w, b: w * b / 8e6"]), 1),
        "no_checks": (lambda: notebook([*START, *[source for _, source in ANSWERS.values()]]), 3),
        "no_metadata": (lambda: notebook(good, labkit={}), 3),
        "forged": (lambda: notebook([*START, FORGED, "megabytes = bits_per_weight = nearest = Equal()", *map(check, ALL)]), 0),
        "forged_function": (lambda: notebook([*START, FORGED, "megabytes = lambda *a: Equal()", check("00.1")]), 0),
        "speaks_on_the_line": (lambda: notebook([*START, SPEAKS, "megabytes = 1.0", check("00.1")]), 0),
        "lies_about_answers": (lambda: notebook([*START, LIES.format(answer='{"handed": [["00.1"], [1, 2, 3]]}'), check("00.1")]), 0),
        "lies_about_everything": (lambda: notebook([*START, LIES.format(answer="7"), check("00.1")]), 0),
        "lies_with_errors": (lambda: notebook([*START, LIES.format(answer="1 / 0"), check("00.1")]), 0),
        "guesses": (lambda: notebook([*START, 'for i in range(100000): labkit.check("00.1", lambda w, b, i=i: i)']), 0),
        "hanging_answer": (lambda: notebook([*good[:2], "def megabytes(w, b):\n    while True: pass", *good[3:]]), 2),
        "half_characters": (lambda: notebook([*good, "print(chr(0xd800)); raise ValueError(chr(0xdfff))"]), 3),
        "markup": (lambda: notebook([*good, "print('<script>alert(1)</script>')"]), 3),
        "pries": (lambda: notebook([*good, SNOOP.format(places=places)]), 3),
        "network": (lambda: notebook([*good, "import socket\nsocket.create_connection(('192.0.2.1', 80), 3)"]), 3),
    }  # fmt: skip
    for name, cell in after.items():  # in the middle: what comes before and after must count all the same
        found[name] = (lambda cell=cell: notebook([*good[:4], cell, *good[4:]]), 3)
    return found


def write(folder: Path, count: int, places: str = "/tmp", only: Sequence[str] = ()) -> dict[str, int]:
    """Write `count` submissions into `folder`, kinds in turn with good ones between; learner -> points deserved."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {name: one for name, one in kinds(places).items() if not only or name in only}
    expected, names = {}, list(chosen)
    for i in range(count):
        name = names[i % len(names)] if only or i < len(names) or i % 4 == 0 else ("good", "half", "untouched")[i % 3]
        make, points = kinds(places)[name]
        learner = f"{i:03d}-{name}"
        if i % 2:
            path = folder / f"{learner}.ipynb"
        else:
            path = folder / learner / "00_start_here.ipynb"
            path.parent.mkdir()
        path.write_text(make(), encoding="utf-8")
        expected[learner] = points
    return expected


def write_course(folder: Path) -> Path:
    """The small lab as the course has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "00_start_here.ipynb").write_text(notebook(solved()), encoding="utf-8")
    return folder


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_course(target / "course")
    points = write(target / "submissions", int(sys.argv[2]) if len(sys.argv) > 2 else 200)
    (target / "expected.json").write_text(json.dumps(points, indent=1), encoding="utf-8")
