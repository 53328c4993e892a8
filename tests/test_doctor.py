"""The doctor: each kind of trouble is found, and each finding names one command."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from labkit import cli, doctor, engines, host
from labkit.doctor import FAIL, OK, WARN, Finding


def test_packages_are_held_against_pyproject():
    listed = dict.fromkeys(extra for _, extra in doctor.requirements())
    assert None in listed and {"llamacpp", "onnx", "openvino", "mlx", "train", "test"} <= set(listed)
    found = {finding.what: finding for finding in doctor._packages()}
    assert found["numpy"].status == OK and found["tokenizers"].status == OK
    assert "labkit" not in found


def test_an_installed_package_without_its_checkout(monkeypatch, tmp_path):
    checkout = doctor.requirements()
    lines = [f"{line}; extra == '{extra}'" if extra else line for line, extra in checkout if ";" not in line]
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "site-packages" / "labkit" / "doctor.py"))
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: {"Requires-Python": ">=3.11"})
    installed = {(Requirement(line).name, extra) for line, extra in doctor.requirements()}
    assert installed == {(Requirement(line).name, extra) for line, extra in checkout if ";" not in line}
    assert doctor._python().status == OK
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: {"Requires-Python": ">=3.99"})
    assert doctor._python().status == FAIL


def test_a_package_outside_its_bounds_or_absent():
    assert doctor._package("numpy", SpecifierSet(">=1"), None).status == OK
    wrong = doctor._package("numpy", SpecifierSet("<1"), None)
    assert wrong.status == FAIL and wrong.fix == 'pip install "numpy<1"'
    core = doctor._package("no-such-thing", SpecifierSet("==1"), None)
    assert (core.status, core.fix) == (FAIL, 'pip install "labkit"')
    extra = doctor._package("no-such-thing", SpecifierSet("==1"), "mlx")
    assert (extra.status, extra.fix) == (WARN, 'pip install "labkit[mlx]"')
    assert "==1 is needed" in extra.found


def test_a_local_build_tag_does_not_count(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.13.0+cpu")
    assert doctor._package("torch", SpecifierSet("==2.13.0"), "onnx").status == OK


@pytest.fixture
def engine(monkeypatch):
    made = SimpleNamespace(TITLE="Fake Engine", PACKAGE="numpy", EXTRA="fake", IMPORTS=["json"])
    monkeypatch.setattr(engines, "engine", lambda name: made)
    return made


def test_engines_are_imported_in_a_child(engine):
    assert doctor._engine("fake").status == OK
    engine.IMPORTS = ["sys; sys.exit('the library is broken')"]
    broken = doctor._engine("fake")
    assert broken.status == FAIL and "the library is broken" in broken.found and "force-reinstall" in broken.fix
    engine.IMPORTS = ["os; os.abort()"]
    assert doctor._engine("fake").status == FAIL
    engine.PACKAGE = "no-such-distribution"
    absent = doctor._engine("fake")
    assert absent.status == WARN and absent.fix == 'pip install "labkit[fake]"'


def test_an_engine_that_hangs(engine, monkeypatch):
    engine.IMPORTS = ["time; time.sleep(60)"]
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 0.5)
    assert "took over 0.5 s" in doctor._engine("fake").found


def test_import_names_of_distributions():
    assert doctor._module_of("numpy", "") == "numpy"
    assert doctor._module_of("huggingface_hub", "") == "huggingface_hub"
    assert doctor._module_of("x", "_native\nrealname\n") == "realname"


def test_memory_and_disk(monkeypatch):
    monkeypatch.setattr(host, "cgroup_memory", lambda: (1_500_000_000, 500_000_000))
    low = doctor._memory()
    assert low.status == WARN and "limit of this container 1.5 GB" in low.found and low.fix
    monkeypatch.setattr(host, "free_disk", lambda folder=None: 5)
    assert (doctor._disk().status, doctor._disk().fix) == (WARN, "labkit clean")
    monkeypatch.setattr(host, "free_disk", lambda folder=None: 10**12)
    assert doctor._disk().status == OK


def test_cpus_show_the_limit(monkeypatch):
    monkeypatch.setattr(host, "cgroup_cpus", lambda: 1.5)
    assert "container limit 1.5" in doctor._cpus().found


def test_compiler(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(engines, "version", lambda name: None)
    assert doctor._compiler().status == WARN and doctor._compiler().fix
    monkeypatch.setattr(engines, "version", lambda name: "0.3")
    assert doctor._compiler().status == OK
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert doctor._compiler().found.startswith("/usr/bin/")


def test_kernel_of_another_environment(tmp_path, monkeypatch):
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for argv0, expected in [("/elsewhere/bin/python", FAIL), (sys.executable, OK)]:
        spec = {"argv": [argv0, "-m", "ipykernel_launcher"], "display_name": "p", "language": "python"}
        (kernel / "kernel.json").write_text(json.dumps(spec))
        found = doctor._kernel()
        assert found.status == expected
    assert found.fix == ""


def test_noise(monkeypatch):
    monkeypatch.setattr(host, "noise", lambda: 0.02)
    monkeypatch.setattr(host, "others_share", lambda before, after: 0.0)
    assert doctor._noise().status == OK
    monkeypatch.setattr(host, "others_share", lambda before, after: 0.9)
    assert doctor._noise().status == WARN and "90% of a CPU" in doctor._noise().found
    monkeypatch.setattr(host, "others_share", lambda before, after: None)
    monkeypatch.setattr(host, "noise", lambda: 0.8)
    assert doctor._noise().status == WARN


def test_output_and_exit_status(monkeypatch, capsys):
    findings = [Finding(OK, "a", "fine"), Finding(WARN, "b", "meh", "do this")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "OK    a: fine\nWARN  b: meh\n      fix:  do this\n\nWARN\n"
    findings.append(Finding(FAIL, "c", "bad", "do that"))
    assert cli.main(["doctor", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["status"] == FAIL
    assert data["findings"][2] == {"status": FAIL, "what": "c", "found": "bad", "fix": "do that"}


def test_a_real_examination_without_imports(home):
    found = doctor.examine(imports=False)
    assert {"Python", "numpy", "memory", "CPUs", "disk", "C++ compiler", "notebook kernel", "quietness"} <= {
        finding.what for finding in found
    }
    assert all(finding.fix for finding in found if finding.status != OK)
