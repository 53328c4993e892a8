"""Bundles: made by pip from a local index, checked file by file, installed for real, all without a network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from labkit import bundle, cli
from labkit.types import LabkitError

# A checkout in small: a package called labkit that a backend of its own builds, so that no index has to have setuptools.
PYPROJECT = """\
[build-system]
requires = []
build-backend = "tiny_backend"
backend-path = ["."]
[project]
name = "labkit"
version = "0.0.1"
[project.optional-dependencies]
more = ["tinyextra"]
lost = ["nowhere-to-be-had"]
"""
BACKEND = """\
import zipfile
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    name = "labkit-0.0.1-py3-none-any.whl"
    metadata = (
        "Metadata-Version: 2.1\\nName: labkit\\nVersion: 0.0.1\\nRequires-Dist: tinydep>=1\\n"
        "Provides-Extra: more\\nRequires-Dist: tinyextra; extra == 'more'\\n"
        "Requires-Dist: only-on-mars; sys_platform == 'mars'\\n"
        "Provides-Extra: lost\\nRequires-Dist: nowhere-to-be-had; extra == 'lost'\\n"
    )
    info = "labkit-0.0.1.dist-info/"
    with zipfile.ZipFile(wheel_directory + "/" + name, "w") as wheel:
        wheel.writestr("labkit/__init__.py", "import tinydep\\n")
        wheel.writestr(info + "METADATA", metadata)
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nGenerator: tiny\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""


def tiny_wheel(folder: Path, name: str, version: str = "1.0") -> None:
    info = f"{name}-{version}.dist-info/"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(info + "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nGenerator: tiny\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "tiny_backend.py").write_text(BACKEND)
    notebooks = root / "notebooks" / "module04_quantization"
    notebooks.mkdir(parents=True)
    (notebooks / "01_foundations.ipynb").write_text('{"cells": []}')
    (notebooks / ".ipynb_checkpoints").mkdir()
    (notebooks / ".ipynb_checkpoints" / "01_foundations.ipynb").write_text("mine")
    return root


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    for name in ("tinydep", "tinyextra"):
        tiny_wheel(folder, name)
    return folder


@pytest.fixture(scope="module")
def offline(index: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(index))
        yield


@pytest.fixture(scope="module")
def made(offline, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    model = folder / "tiny-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file = folder / "class.zip"
    about = bundle.make(file, ["more"], [str(model)], source=checkout)
    assert about["requirement"] == "labkit[more]" and about["models"] == ["tiny-model"] and about["notes"] == []
    return file


def changed(bundle_file: Path, target: Path, edit) -> Path:
    """A copy of a bundle in which `edit(files)` changed the dict of names and contents."""
    with zipfile.ZipFile(bundle_file) as zipped:
        files = {name: zipped.read(name) for name in zipped.namelist()}
    edit(files)
    with zipfile.ZipFile(target, "w") as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)
    return target


def noted_again(files: dict[str, bytes]) -> None:
    """Write SHA256SUMS as if the files had been bundled like this."""
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items() if name != bundle.SUMS)
    files[bundle.SUMS] = sums.encode()


def test_what_is_in_it(made: Path, checkout: Path):
    assert bundle.check(made) == []
    names = set(zipfile.ZipFile(made).namelist())
    assert names == {
        "README.txt", "SHA256SUMS", "bundle.json", "install.py", "install.sh", "install.ps1",
        "models/tiny-model/config.json", "notebooks/module04_quantization/01_foundations.ipynb",
        "wheels/labkit-0.0.1-py3-none-any.whl", "wheels/tinydep-1.0-py3-none-any.whl",
        "wheels/tinyextra-1.0-py3-none-any.whl",
    }  # fmt: skip
    assert sorted(p.name for p in checkout.iterdir()) == ["notebooks", "pyproject.toml", "tiny_backend.py"]
    assert [p.name for p in made.parent.iterdir() if p.name.startswith(".partial")] == []


def test_it_installs_with_no_index_and_runs(made: Path, tmp_path: Path):
    if sys.platform == "win32":
        pytest.skip("install.sh needs a POSIX shell; install.ps1 calls the same install.py.")
    zipfile.ZipFile(made).extractall(tmp_path)
    env = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/"}
    done = subprocess.run(["sh", str(tmp_path / "install.sh"), sys.executable], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import labkit, tinydep, tinyextra; print(labkit.__file__)"
    where = subprocess.run([tmp_path / ".venv/bin/python", "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert where.stdout.startswith(str(tmp_path / ".venv"))


def test_the_installer_refuses_what_does_not_fit(made: Path, tmp_path: Path):
    zipfile.ZipFile(made).extractall(tmp_path)
    run = [sys.executable, str(tmp_path / "install.py")]
    notebook = tmp_path / "notebooks/module04_quantization/01_foundations.ipynb"
    notebook.write_text("{}")
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1 and "01_foundations.ipynb is damaged" in done.stderr
    notebook.unlink()
    assert "is missing; unpack" in subprocess.run(run, capture_output=True, text=True).stderr
    about = json.loads((tmp_path / "bundle.json").read_text())
    (tmp_path / "bundle.json").write_text(json.dumps(about | {"python": "3.2"}))
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1 and "this bundle is for Python 3.2" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / ".venv").exists()


NOTEBOOK = "notebooks/module04_quantization/01_foundations.ipynb"
DEPENDENCY = "wheels/tinydep-1.0-py3-none-any.whl"


def _pop_and_note(name: str):
    def edit(files: dict[str, bytes]) -> None:
        files.pop(name)
        noted_again(files)

    return edit


def _other_schema(files: dict[str, bytes]) -> None:
    files["bundle.json"] = json.dumps(json.loads(files["bundle.json"]) | {"schema": 99}).encode()
    noted_again(files)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda files: files.update({NOTEBOOK: b"{}"}), f"{NOTEBOOK} is damaged: its SHA-256 differs"),
        (lambda files: files.pop(NOTEBOOK), f"{NOTEBOOK} is missing from the bundle"),
        (lambda files: files.pop("install.sh"), "install.sh is missing from the bundle"),
        (lambda files: files.pop("SHA256SUMS"), "SHA256SUMS is missing from the bundle"),
        (lambda files: files.update({"bundle.json": b"{"}), "cannot be read"),
        (lambda files: files.update({"extra.txt": b"!"}), "extra.txt is not listed in SHA256SUMS"),
        (lambda files: files.update({"../evil.sh": b"!"}), "../evil.sh would be unpacked outside"),
        (_other_schema, "it has schema 99; this labkit reads 1"),
        (_pop_and_note(NOTEBOOK), "it holds no notebooks"),
        (_pop_and_note(DEPENDENCY), "labkit needs tinydep>=1, but no such wheel is there"),
        (_pop_and_note("wheels/labkit-0.0.1-py3-none-any.whl"), "the bundle needs labkit, but no such wheel is there"),
    ],
)
def test_every_damage_is_a_sentence(made: Path, tmp_path: Path, capsys, edit, sentence: str):
    broken = changed(made, tmp_path / "class.zip", edit)
    assert cli.main(["bundle", "--check", str(broken)]) == 1
    said = capsys.readouterr().out
    assert sentence in said and all(line.startswith("class.zip: ") and line.endswith(".") for line in said.splitlines())


def test_bytes_lost_on_the_way(made: Path, tmp_path: Path):
    data = bytearray(made.read_bytes())
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    assert bundle.check(tmp_path / "cut.zip") == ["cut.zip is cut short or not a zip; make or copy the bundle again."]
    with zipfile.ZipFile(made) as zipped:
        data[zipped.getinfo(NOTEBOOK).header_offset + 30 + len(NOTEBOOK)] ^= 0xFF
    (tmp_path / "flipped.zip").write_bytes(data)
    assert any(f"{NOTEBOOK} is damaged" in sentence for sentence in bundle.check(tmp_path / "flipped.zip"))
    assert "does not exist" in bundle.check(tmp_path / "none.zip")[0]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_is_there_twice(made: Path, tmp_path: Path):
    twice = tmp_path / "class.zip"
    shutil.copyfile(made, twice)
    with zipfile.ZipFile(twice, "a") as zipped:
        zipped.writestr("install.sh", "rm -rf /")
    assert "class.zip: it holds a file twice; make the bundle again." in bundle.check(twice)


def test_a_wheel_too_old_is_noticed(made: Path, tmp_path: Path):
    tiny_wheel(tmp_path, "tinydep", "0.5")
    old = "wheels/tinydep-0.5-py3-none-any.whl"

    def edit(files: dict[str, bytes]) -> None:
        files.pop(DEPENDENCY)
        files[old] = (tmp_path / Path(old).name).read_bytes()
        noted_again(files)

    said = bundle.check(changed(made, tmp_path / "class.zip", edit))
    assert said == ["class.zip: labkit needs tinydep>=1, but version 0.5 is there; make the bundle again."]


def test_what_cannot_be_met_leaves_nothing(offline, checkout: Path, tmp_path: Path):
    out = tmp_path / "class.zip"
    for extras, models, sentence in [
        (["lost"], [], "pip could not collect the wheels: .*nowhere-to-be-had"),
        (["everything"], [], "labkit has no extra 'everything'; expected some of more, lost, or none"),
        ([], ["no-such-model"], "No checkpoint 'no-such-model'"),
    ]:
        with pytest.raises(LabkitError, match=sentence):
            bundle.make(out, extras, models, source=checkout)
    with pytest.raises(LabkitError, match="is not a checkout of labkit"):
        bundle.make(out, [], source=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_older_bundle_stays_when_a_new_one_fails(offline, checkout: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "class.zip"
    out.write_bytes(b"the old one")
    monkeypatch.setattr(bundle, "_pack", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(LabkitError, match="could not be written"):
        bundle.make(out, [], source=checkout)
    assert out.read_bytes() == b"the old one" and len(list(tmp_path.iterdir())) == 1


def test_the_command_names_labkits_own_extras():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(bundle.EXTRAS) == set(project["project"]["optional-dependencies"]) - {"test", "all", "fleet", "load", "qnn"}  # no lab needs these


def test_powershell_calls_the_same_installer():
    if shutil.which("pwsh") is None:
        pytest.skip("PowerShell is not installed; the Windows workflow runs install.ps1.")
    script = bundle.SCRIPTS / "install.ps1"
    done = subprocess.run(["pwsh", "-File", str(script), sys.executable], capture_output=True, text=True)
    assert "bundle.json" in done.stderr  # the installer ran, and has no bundle around it
