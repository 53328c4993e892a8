"""Building: once, whole or not at all, whatever interrupts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_engine
import pytest

from labkit import LabkitError, Recipe, build, engines, host, load
from labkit._capture import captured
from labkit.build import place, read
from labkit.checkpoint import checkpoint

F16 = Recipe("fake", "f16")
REPO = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, home: Path):
    monkeypatch.setattr(engines, "ENGINES", engines.ENGINES)
    monkeypatch.setitem(sys.modules, "labkit.engines.fake", fake_engine)
    fake_engine.install()
    fake_engine.builds.clear()


def leftovers(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if ".partial-" in p.name]


def in_child(code: str, home: Path, **extra: str) -> subprocess.Popen:
    """A Python process with the fake engine and labkit's functions at hand."""
    start = (
        "import fake_engine; fake_engine.install()\n"
        "from labkit import Recipe, build\n"
    )
    env = {**os.environ, "LABKIT_HOME": str(home), "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}", **extra}
    return subprocess.Popen([sys.executable, "-c", start + code], env=env, stdout=subprocess.PIPE, text=True)


# --- the good case ---------------------------------------------------------------------------------------------------


def test_built_once_and_found_again(tiny_llama: Path, home: Path, capfd):
    first = build(tiny_llama, F16)
    assert fake_engine.builds == ["fake-f16"]
    assert first.weight_bytes == 2 * 1_312_000 and first.weights == 1_312_000 and first.bits_per_weight == 16.0
    assert first.notes == ("norms are kept in float16",) and first.settings == {"half": True}
    assert first.engine_version == engines.version("fake") and first.seconds > 0
    assert first.path.parent == home / "artifacts" / "tiny-llama" and first.path.name.startswith("fake-f16-")
    second = build(checkpoint(tiny_llama), F16)
    assert second == first and fake_engine.builds == ["fake-f16"]
    assert capfd.readouterr() == ("", "")
    log = (first.path / "build.log").read_text()
    assert "python chatter" in log and "chatter from C" in log
    assert leftovers(home) == []


def test_artifact_json_reads_back(tiny_llama: Path):
    made = build(tiny_llama, Recipe("fake", "F16", group=32, names=["a", "b"]))
    found = read(made.path)
    assert found == made and found.recipe == Recipe("fake", "f16", names=["a", "b"], group=32)
    assert found.checkpoint.encode("x") == checkpoint(tiny_llama).encode("x")
    assert "16.000" in found._repr_html_() and "tiny-llama/fake-f16" in repr(found)


def test_identity_is_checkpoint_recipe_and_version(tiny_llama: Path, make_llama, monkeypatch):
    places = {place(checkpoint(tiny_llama), F16), place(checkpoint(make_llama(seed=3)), F16),
              place(checkpoint(tiny_llama), Recipe("fake", "f16", group=32))}  # fmt: skip
    monkeypatch.setattr(engines, "version", lambda name: "99.0")
    places.add(place(checkpoint(tiny_llama), F16))
    assert len(places) == 4


def test_force_builds_again(tiny_llama: Path):
    build(tiny_llama, F16)
    build(tiny_llama, F16, force=True)
    assert len(fake_engine.builds) == 2


def test_out_is_used_found_and_never_trampled(tiny_llama: Path, tmp_path: Path, make_llama):
    out = tmp_path / "mine" / "here"
    assert build(tiny_llama, F16, out=out).path == out
    assert build(tiny_llama, F16, out=out).path == out and len(fake_engine.builds) == 1
    other = make_llama(seed=9)
    with pytest.raises(LabkitError, match="not empty and holds something else"):
        build(other, F16, out=out)
    assert read(out).checkpoint.name == "tiny-llama"
    assert build(other, F16, out=out, force=True).checkpoint.name == "made"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    with pytest.raises(LabkitError, match="not empty"):
        build(tiny_llama, F16, out=precious)
    assert (precious / "thesis.txt").read_text() == "mine"


def test_load_takes_an_artifact_or_its_folder(tiny_llama: Path):
    made = build(tiny_llama, F16)
    assert load(made, exact=True).settings == {"exact": True, "threads": None, "path": made.path}
    assert load(str(made.path), threads=1).settings["threads"] == 1


# --- what the user can get wrong -------------------------------------------------------------------------------------


def test_unknown_engine_and_precision(tiny_llama: Path, home: Path):
    with pytest.raises(LabkitError, match="Unknown engine 'tensorrt'; expected one of llamacpp"):
        build(tiny_llama, Recipe("tensorrt", "f16"))
    with pytest.raises(LabkitError, match="Fake Engine has no precision 'q9'; expected one of f16, slow"):
        build(tiny_llama, Recipe("fake", "q9"))
    assert not (home / "artifacts").exists()


def test_absent_engine(tiny_llama: Path, monkeypatch):
    monkeypatch.setattr(fake_engine, "PACKAGE", "no-such-distribution")
    with pytest.raises(LabkitError, match=r'Fake Engine is not installed\. Try:  pip install "labkit\[fake\]"'):
        build(tiny_llama, F16)


def test_weights_that_are_no_numbers_are_not_built(make_llama, home: Path):
    from tiny_checkpoint import random_weights, write_safetensors

    folder = make_llama()
    tensors = random_weights(json.loads((folder / "config.json").read_text()))
    tensors["model.norm.weight"][5] = float("nan")
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(LabkitError, match=r"model\.norm\.weight.*NaN"):
        build(folder, F16)
    assert fake_engine.builds == [] and leftovers(home) == []


# --- what the world can do -------------------------------------------------------------------------------------------


def test_a_failing_engine_shows_its_last_words(tiny_llama: Path, home: Path, capfd):
    with pytest.raises(LabkitError, match="ValueError: tensor 7 has the wrong mood") as caught:
        build(tiny_llama, Recipe("fake", "broken"))
    assert "chatter from C" in str(caught.value) and capfd.readouterr() == ("", "")
    assert leftovers(home) == [] and not list(home.rglob("artifact.json"))


def test_an_engines_own_sentence_is_passed_on(tiny_llama: Path, home: Path):
    with pytest.raises(LabkitError, match=r"^rows of 100 do not divide by 256; take f16\.$"):
        build(tiny_llama, Recipe("fake", "refused"))
    assert leftovers(home) == []


def test_disk_full_as_the_system_says_it(tiny_llama: Path, home: Path):
    with pytest.raises(LabkitError, match=r"disk filled up while building fake-full from tiny-llama.*labkit clean"):
        build(tiny_llama, Recipe("fake", "full"))
    assert leftovers(home) == [] and not list(home.rglob("artifact.json"))


@pytest.mark.skipif(sys.platform != "linux", reason="a small file system is made with mount")
def test_disk_really_full(tiny_llama: Path, tmp_path: Path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        monkeypatch.setenv("LABKIT_HOME", str(small))
        with pytest.raises(LabkitError, match=r"needs about 2\.62 MB of disk.*labkit clean"):
            build(tiny_llama, F16)
        monkeypatch.setitem(fake_engine.PRECISIONS, "f16", (1.0, 1.0))  # an estimate that is too hopeful
        with pytest.raises(LabkitError, match="disk filled up while building"):
            build(tiny_llama, F16)
        assert leftovers(small) == [] and not list(small.rglob("weights.bin"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_too_little_memory_is_said_before(tiny_llama: Path, monkeypatch):
    monkeypatch.setattr(fake_engine, "BUILD_BYTES_PER_WEIGHT", 10.0, raising=False)
    monkeypatch.setattr(host, "available_memory", lambda: 10_000_000)
    with pytest.raises(LabkitError, match=r"needs about 13\.1 MB of memory, but 10 MB is left"):
        build(tiny_llama, F16)
    assert fake_engine.builds == []


def test_an_interrupted_build_leaves_nothing_and_an_old_artifact_stays(tiny_llama: Path, home: Path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        build(tiny_llama, Recipe("fake", "stopped"))
    assert leftovers(home) == [] and not list(home.rglob("artifact.json"))
    made = build(tiny_llama, F16)
    monkeypatch.setattr(fake_engine, "_misbehave", lambda precision, out: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(tiny_llama, F16, force=True)
    assert read(made.path) == made and leftovers(home) == []


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_build_looks_unfinished_and_the_next_one_cleans_up(tiny_llama: Path, home: Path, blow, monkeypatch):
    slow = Recipe("fake", "slow")
    child = in_child(f"build({str(tiny_llama)!r}, Recipe('fake', 'slow'))", home, FAKE_SECONDS="60")
    started = home / "artifacts" / "tiny-llama" / "started"
    while not started.exists():
        assert child.poll() is None, "the child ended early"
        time.sleep(0.05)
    child.send_signal(blow)
    child.wait()
    target = place(checkpoint(tiny_llama), slow)
    assert not target.exists()
    monkeypatch.setenv("FAKE_SECONDS", "0")
    assert build(tiny_llama, slow).path == target
    assert leftovers(home) == []


def test_two_processes_build_one_artifact(tiny_llama: Path, home: Path):
    code = f"print(build({str(tiny_llama)!r}, Recipe('fake', 'slow')).path, len(fake_engine.builds))"
    children = [in_child(code, home) for _ in range(2)]
    said = [child.communicate()[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert said[0][0] == said[1][0] and sorted(n for _, n in said) == ["0", "1"]
    assert read(said[0][0]).weight_bytes == 2 * 1_312_000 and leftovers(home) == []


# --- damage ----------------------------------------------------------------------------------------------------------


def test_damaged_record(tiny_llama: Path):
    made = build(tiny_llama, F16)
    good = (made.path / "artifact.json").read_text()
    for bad, sentence in [
        (good[:100], "is damaged"),
        ("[]", "expected a JSON object"),
        (good.replace('"schema": 1', '"schema": 99'), "has schema 99"),
        (good.replace('"recipe"', '"recipy"'), "is damaged .*'recipe'"),
    ]:
        (made.path / "artifact.json").write_text(bad)
        with pytest.raises(LabkitError, match=sentence):
            read(made.path)
    (made.path / "artifact.json").unlink()
    with pytest.raises(LabkitError, match=r"holds no artifact\.json"):
        read(made.path)


def test_an_artifact_of_the_house_model_outlives_the_place_it_was_installed_in(home: Path):
    made = build("edgehome", F16)
    record = made.path / "artifact.json"
    saved = json.loads(record.read_text())
    saved["checkpoint"]["path"] = str(home / "an-older-environment")
    record.write_text(json.dumps(saved))
    assert read(made.path).checkpoint == checkpoint("edgehome")


def test_a_damaged_artifact_is_not_used_but_built_again(tiny_llama: Path):
    made = build(tiny_llama, F16)
    with open(made.path / "weights.bin", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(LabkitError, match=r"weights\.bin has 1000 bytes instead of 2624000"):
        read(made.path)
    assert build(tiny_llama, F16).weight_bytes == made.weight_bytes and len(fake_engine.builds) == 2
    (made.path / "weights.bin").unlink()
    with pytest.raises(LabkitError, match=r"weights\.bin is missing"):
        read(made.path)


def test_a_checkpoint_that_moved_or_changed(tiny_llama: Path, tmp_path: Path, make_llama):
    folder = make_llama("moving")
    made = build(folder, F16)
    folder.rename(tmp_path / "away")
    with pytest.raises(LabkitError, match=r"checkpoint of .* is gone"):
        read(made.path)
    shutil.copytree(tiny_llama, folder)
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(LabkitError, match="changed since"):
        read(made.path)


def test_a_checkpoint_that_changed_after_it_was_opened(make_llama):
    opened = checkpoint(make_llama("changing"))
    (opened.path / "generation_config.json").write_text("{}")
    with pytest.raises(LabkitError, match="changed since"):
        build(opened, F16)


# --- capture ---------------------------------------------------------------------------------------------------------


def test_capture_takes_children_and_restores(tmp_path: Path, capfd):
    log = tmp_path / "log"
    print("before")
    with captured(log):
        print("inside")
        subprocess.run([sys.executable, "-c", "print('child')"], check=True)
        os.write(1, b"raw\n")
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"
    assert sorted(log.read_text().split()) == ["child", "inside", "raw"]
