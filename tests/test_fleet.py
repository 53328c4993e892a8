"""The fleet: the order of work without any worker, and real worker processes under limits, killed, stopped and out of step."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from labkit import _fleet_command, _fleet_task, checkpoint, fleet
from labkit.ledger import comparable, ledger
from labkit.types import LabkitError, Recipe

QUICK = {"rounds": [1], "retries": [0], "seconds": [0.05], "prompt_tokens": [8], "new_tokens": [8], "threads": [1]}


# --- no worker needed ------------------------------------------------------------------------------------------------


def test_a_grid_has_one_speed_task_a_setting_and_one_of_the_others_a_recipe(tiny_llama):
    tasks = _fleet_command.plan(
        [str(tiny_llama)], ["llamacpp", "openvino"], ["q8_0", "f16"], ["speed", "size"], {"threads": [1, 2], "imatrix": [True, False]}
    )
    speed = [one for one in tasks if one.metric == "speed"]
    assert [one.settings["threads"] for one in speed] == [1, 2]
    recipes = speed[0].recipes
    assert Counter((one.engine, one.precision) for one in recipes) == {
        ("llamacpp", "q8_0"): 2, ("llamacpp", "f16"): 2, ("openvino", "f16"): 2,
    }  # fmt: skip
    assert [one.recipes for one in tasks if one.metric == "size"] == [(one,) for one in recipes], "threads make no second size"


def test_divergence_is_from_the_widest_precision_unless_said(tiny_llama):
    one, *_ = _fleet_command.plan([str(tiny_llama)], ["llamacpp"], ["q8_0"], ["divergence"])
    assert one.reference == Recipe("llamacpp", "f32")
    one, *_ = _fleet_command.plan([str(tiny_llama)], ["llamacpp"], ["q8_0"], ["divergence"], reference="llamacpp:f16")
    assert one.reference == Recipe("llamacpp", "f16")


@pytest.mark.parametrize(
    ("engines", "precisions", "metrics", "said"),
    [
        (["llamacpp"], ["int4"], ["size"], "llamacpp has none of the precisions int4"),
        (["llamacpp"], ["q8_0"], ["beauty"], "No metric 'beauty' for a sweep"),
        (["teapot"], ["q8_0"], ["size"], "teapot"),
    ],
)
def test_an_impossible_grid_is_one_sentence(tiny_llama, engines, precisions, metrics, said):
    with pytest.raises(LabkitError, match=said):
        _fleet_command.plan([str(tiny_llama)], engines, precisions, metrics)


@pytest.mark.parametrize("text", ["threads", "=1", "threads=", "a b=1"])
def test_a_setting_that_is_none_is_refused(text):
    with pytest.raises(LabkitError, match="is not a setting"):
        _fleet_command._setting(text)


def worker(address: str, device: str = "a", machine: str = "m") -> fleet.Worker:
    return fleet.Worker(address, device, device, machine, {"engines": {"llamacpp": "1"}})


def task(metric: str, device: str | None = None) -> fleet.Task:
    return fleet.Task(metric, "model", "f", (Recipe("llamacpp", "q8_0"),), device=device)


class Nobody:
    """A fleet that needs no Dask: workers as they are set."""

    def __init__(self, *workers: fleet.Worker):
        self.workers = {one.address: one for one in workers}
        self.refused: dict[str, str] = {}

    def devices(self):
        return {one.device: one for one in self.workers.values()}


def state(tmp_path: Path, *workers: fleet.Worker) -> fleet._Sweep:
    return fleet._Sweep(Nobody(*workers), ledger(tmp_path / "l.jsonl"), 10, lambda text: None, False, 0.0)


def test_on_one_machine_builds_run_beside_builds_and_measurements_alone(tmp_path):
    one, other, far = worker("1"), worker("2", "b"), worker("3", "c", "elsewhere")
    sweep = state(tmp_path, one, other, far)
    sweep.flying = {1: fleet._Flight(task("build"), one, 0.0)}
    assert sweep._may(task("build"), other) and sweep._may(task("size"), far)
    assert not sweep._may(task("speed"), other), "a build would disturb it"
    assert not sweep._may(task("build"), one), "it has something to do"
    sweep.flying = {1: fleet._Flight(task("speed"), one, 0.0)}
    assert not sweep._may(task("build"), other) and not sweep._may(task("size"), other)
    assert sweep._may(task("speed"), far)


def test_a_measurement_waits_for_the_builds_of_its_machine(tmp_path):
    one, other = worker("1"), worker("2", "b")
    sweep = state(tmp_path, one, other)
    sweep.waiting = [task("build", "b")]
    assert not sweep._may(task("speed", "a"), one)
    sweep.waiting = []
    assert sweep._may(task("speed", "a"), one) and not sweep._may(task("speed", "a"), other), "bound to its device"


def test_a_task_that_kills_its_workers_is_reported_after_three(tmp_path):
    sweep = state(tmp_path, worker("1"))
    for _ in range(fleet.ATTEMPTS):
        sweep.waiting.clear()
        sweep._lost(fleet._Flight(task("size"), worker("1"), 0.0), "its worker died")
    assert not sweep.waiting and "3 times" in sweep.outcome.problems[0].why


def test_what_one_device_refuses_another_is_asked_for(tmp_path):
    sweep = state(tmp_path, worker("1"), worker("2", "b"))
    sweep._refused(task("size"), worker("1"), "no such engine")
    assert sweep.waiting == [task("size")] and not sweep._may(task("size"), worker("1")) and sweep._may(task("size"), worker("2", "b"))
    sweep._refused(task("size"), worker("2", "b"), "no such engine")
    assert [one.why for one in sweep.outcome.problems] == ["no such engine"]


def test_speeds_refused_together_are_tried_one_by_one(tmp_path):
    sweep = state(tmp_path, worker("1"))
    sweep.versions = {"a": {"llamacpp": "1"}}
    both = fleet.Task("speed", "m", "f", (Recipe("llamacpp", "q8_0"), Recipe("llamacpp", "f16")), device="a")
    sweep._refused(both, worker("1"), "one of them crashed")
    assert [one.recipes[0].precision for one in sweep.waiting] == ["q8_0", "f16"] and not sweep.outcome.problems


def test_engines_in_unlike_versions_are_told():
    said = fleet._unlike({"a": {"x": "1", "y": "2"}, "b": {"x": "1.1", "y": "2"}}, {"a": "one", "b": "two"})
    assert said == ["x differs in version (1 on one, 1.1 on two): a difference in speed may be the engine's, not the device's."]


# --- a task in its process, no Dask ----------------------------------------------------------------------------------


def job(folder: Path, **changed: object) -> str:
    about = {"metric": "size", "model": str(folder), "fingerprint": checkpoint(folder).fingerprint, "settings": {}, "reference": None}
    return json.dumps(about | {"recipes": [Recipe("llamacpp", "q8_0").to_json()]} | changed)


def test_a_task_is_stopped_at_its_limit(tiny_llama, home):
    answer = json.loads(_fleet_task.perform(job(tiny_llama), 0.05))
    assert answer["kind"] == "late"


def test_other_files_under_the_same_name_are_refused(tiny_llama, home):
    answer = json.loads(_fleet_task.perform(job(tiny_llama, fingerprint="0"), 60))
    assert answer["kind"] == "refused" and "another model" in answer["error"]


# --- real workers ----------------------------------------------------------------------------------------------------


class Room:
    """A scheduler in this process and workers as processes of their own, each with its own home."""

    def __init__(self, folder: Path):
        distributed = pytest.importorskip("distributed")
        pytest.importorskip("llama_cpp")
        self.folder, self.processes = folder, {}
        self.cluster = distributed.LocalCluster(n_workers=0, dashboard_address=None, silence_logs=50)
        self.client = distributed.Client(self.cluster, set_as_default=False)
        self.fleet = fleet.Fleet(self.client)

    def start(self, name: str, *, cores: int | None = None, file_bytes: int | None = None, preload: str = "") -> None:
        """A worker that may use so many cores and write files up to so many bytes (a larger one fails as on a full disk)."""

        def limit() -> None:
            import resource

            if cores and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
            if file_bytes:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        command = [sys.executable, "-m", "distributed.cli.dask_worker", self.cluster.scheduler_address, "--name", name]
        command += ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0"]
        command += ["--local-directory", str(self.folder / name)]
        if preload:
            (self.folder / f"{name}.py").write_text(preload)
            command += ["--preload", str(self.folder / f"{name}.py")]
        package = str(Path(fleet.__file__).parents[1])
        env = os.environ | {"LABKIT_HOME": str(self.folder / f"home-{name}"), "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
        log = open(self.folder / f"{name}.log", "wb")  # noqa: SIM115 - the process keeps it
        self.processes[name] = subprocess.Popen(command, env=env, stdout=log, stderr=log, preexec_fn=limit)

    def wait(self, count: int) -> None:
        self.client.wait_for_workers(count, timeout=120)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.client.close()
        self.cluster.close()


@pytest.fixture
def room(tmp_path: Path, home: Path):
    if sys.platform == "win32":
        pytest.skip("the limits of these workers are POSIX")
    one = Room(tmp_path)
    yield one
    one.end()


def apart(measurements) -> bool:
    """Whether the measurements of this machine followed one another (those timed side by side are one)."""
    spans = sorted({tuple(one.details["span"]) for one in measurements})
    return all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_three_workers_under_limits_one_killed_in_the_middle(room, make_llama):
    model = str(make_llama(vocab_size=4096))  # its f32 file is over the small disk's limit, the f16 one is not
    room.start("one-core", cores=1)
    room.start("all-cores")
    room.start("small-disk", file_bytes=6_000_000)
    room.wait(3)
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        if text.startswith("one-core: speed"):  # about to be given it: it dies while it measures
            threading.Timer(0.5, room.processes["one-core"].kill).start()

    tasks = _fleet_command.plan([model], ["llamacpp"], ["f32", "f16"], ["speed", "size"], QUICK)
    book = ledger()
    found = fleet.sweep(room.fleet, tasks, book, seconds=120, say=say, grace=1.0)

    assert {one["device"] for one in found.devices} == {"one-core", "all-cores", "small-disk"}
    got = Counter((one.host.get("device"), one.metric, one.artifact["precision"]) for one in book)
    assert max(got.values()) == 1, "nothing is counted twice"
    assert {key for key in got if key[1] == "speed"} == {
        ("all-cores", "speed", "f32"), ("all-cores", "speed", "f16"), ("small-disk", "speed", "f16"),
    }  # fmt: skip
    assert sorted(precision for _, metric, precision in got if metric == "size") == ["f16", "f32"], "once, on any device"
    why = {(one.device, one.task.split()[0]): one.why for one in found.problems}
    assert "no worker of this device is left" in why["one-core", "speed"]
    assert "disk" in why["small-disk", "build"] and len(found.problems) == 2
    assert any("its worker died during speed" in text for text in told)
    assert apart(book)
    with pytest.raises(LabkitError, match="unlike machines"):
        comparable(book.frame(metric="speed", precision="f16"))
    if len(os.sched_getaffinity(0)) > 1 if hasattr(os, "sched_getaffinity") else False:
        assert {one["device"]: one["cores"] for one in found.devices}["one-core"] == 1

    # the worker comes back under its name: only what is missing is measured
    room.start("one-core", cores=1)
    room.wait(3)
    more = fleet.sweep(room.fleet, tasks, book, seconds=120, grace=1.0)
    assert {(one.host["device"], one.artifact["precision"]) for one in more.measurements} == {("one-core", "f32"), ("one-core", "f16")}
    assert more.kept == 4 and len(book) == 7


def test_a_stopped_worker_and_one_out_of_step_are_reported_and_the_work_moves(room, tiny_llama):
    room.start("stopped")
    room.start("other", preload="import labkit\nlabkit.__version__ = '0.0.1'\n")
    room.wait(2)
    room.fleet.look()
    assert [one.name for one in room.fleet.workers.values()] == ["stopped"]
    assert "it has labkit 0.0.1" in next(iter(room.fleet.refused.values()))
    room.start("sound")
    room.wait(3)

    def say(text: str) -> None:
        if text.startswith("stopped: size"):
            room.processes["stopped"].send_signal(signal.SIGSTOP)

    tasks = _fleet_command.plan([str(tiny_llama)], ["llamacpp"], ["q8_0"], ["size"])
    start = time.monotonic()
    found = fleet.sweep(room.fleet, tasks, ledger(), seconds=8, say=say, grace=2.0)
    room.processes["stopped"].send_signal(signal.SIGCONT)
    assert time.monotonic() - start < 60
    assert [one.host["device"] for one in found.measurements] == ["sound"] and not found.problems
    assert any("did not answer" in note for note in found.notes) and any("0.0.1" in note for note in found.notes)
    time.sleep(1.0)
    assert len(ledger()) == 1, "what the stopped one says later is not counted"


def test_nobody_at_the_address_is_one_sentence(capsys, home, tiny_llama):
    pytest.importorskip("distributed")
    from labkit.cli import main

    asked = ["sweep", str(tiny_llama), "--engine", "llamacpp", "--precision", "q8_0", "--scheduler", "nonsense://x"]
    assert main(asked) == 2
    assert "No Dask scheduler answers" in capsys.readouterr().err


def test_the_frame_by_device_shares_quality_and_keeps_speeds_apart(tmp_path):
    from labkit.types import Measurement

    def made(metric: str, device: str | None, value: float) -> Measurement:
        host = {"cpu": "c"} | ({"device": device} if device else {})
        artifact = {"checkpoint": "m", "engine": "llamacpp", "precision": "q8_0", "options": {}, "weight_bytes": 1, "bits_per_weight": 8.5}
        return Measurement(metric, "", (value,), artifact, {}, "1", host, "2026-01-01T00:00:00+00:00")

    book = ledger(tmp_path / "l.jsonl")
    book.append(made("speed", "pi", 5.0), made("speed", None, 50.0), made("size", "pi", 7.0))
    parts = fleet.by_device(book.frame())
    assert sorted(parts) == ["here", "pi"]
    told = {name: {row.metric: row.values[0] for row in part.itertuples()} for name, part in parts.items()}
    assert told == {"here": {"speed": 50.0, "size": 7.0}, "pi": {"speed": 5.0, "size": 7.0}}
    comparable(parts["pi"])
    with pytest.raises(LabkitError, match="device: None, pi"):
        comparable(book.frame())


# --- labs on the fleet -----------------------------------------------------------------------------------------------


def test_labs_run_on_workers_and_come_back_whole_also_when_one_dies(room, tmp_path):
    """Two labs of a small course on two machines (one machine here, so named apart), the first worker killed while it runs."""
    import nbformat

    from labkit.course import elsewhere, labs

    course = tmp_path / "course" / "notebooks"
    (course / "module04_quantization").mkdir(parents=True)
    line = "labkit.ledger().append(labkit.measure.METRICS['size'].measure(artifact))"
    sources = {
        "00_start_here": "import time; time.sleep(3); print('done')",
        "module04_quantization/01_foundations": "import labkit\nfrom labkit import Recipe, measure\n"
        f"artifact = labkit.build(labkit.checkpoint('edgehome'), Recipe('llamacpp', 'q8_0'))\n{line}",
    }
    for name, source in sources.items():
        heading = nbformat.v4.new_markdown_cell(f"# {name}")
        parameters = nbformat.v4.new_code_cell("profile: str = 'ci'  # effort", metadata={"tags": ["parameters"]})
        nbformat.write(nbformat.v4.new_notebook(cells=[heading, parameters, nbformat.v4.new_code_cell(source)]), course / f"{name}.ipynb")
    chosen = [labs.find(name, course) for name in ("00", "module04/01")]
    find = f"from pathlib import Path\nfrom labkit.course import labs\nlabs.folder = lambda solutions=False: Path({str(course)!r})\n"
    for name in ("first", "second"):
        room.start(name, preload=f"{find}from labkit import _fleet_task\n_fleet_task.machine = lambda: {name!r}\n")
    room.wait(2)
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        if "on first" in text and len(told) < 3:
            threading.Timer(1.5, room.processes["first"].kill).start()

    out = tmp_path / "out"
    out.mkdir()
    given = {lab.id: {"profile": "ci"} for lab in chosen}
    back = {lab.id: record for lab, record, _ in elsewhere.spread(chosen, given, room.fleet, out, seconds=120, say=say, grace=3.0)}
    assert {name: record["status"] for name, record in back.items()} == {"00": "passed", "module04/01": "passed"}, back
    assert {record["device"] for record in back.values()} == {"second"} and any("its worker died" in text for text in told)
    assert "done" in (out / "00.ipynb").read_text()
    (size,) = ledger().where()
    assert (size.metric, size.host["device"]) == ("size", "second")
    room.processes["second"].kill()
    (gone,) = [record for _, record, _ in elsewhere.spread(chosen[:1], given, room.fleet, out, seconds=60, grace=0.5)]
    assert gone["status"] == "failed" and "No worker is left" in gone["failed"][0]["message"] and not (out / "00.ipynb").exists()


def test_a_worker_with_another_notebook_refuses():
    from labkit.course import elsewhere, labs

    lab = labs.labs()[0]
    told = {"lab": lab.id, "notebook": "0", "parameters": {}, "seconds": 1, "solutions": False}
    answer = json.loads(elsewhere.perform(json.dumps(told)))
    assert "another notebook" in answer["error"] and not answer["again"]
