"""Where the course runs: Binder, Codespaces, Colab, GitHub's workflows.

`python tests/test_platforms.py` prints the badges for README, from the repository pyproject.toml names.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from labkit import cli
from labkit.course.labs import folder

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CLASS_EXTRAS = ("llamacpp", "onnx", "openvino", "mlx", "train", "serve", "foundry", "track")  # what the labs need
SERVER = {"ipykernel", "jupyterlab", "papermill", "nbclient", "nbconvert"}  # Colab brings its own
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; it comes with the test extra.")


# --- Binder ------------------------------------------------------------------------------------------------------


def wanted(*extras: str, system: str = "linux") -> dict[str, Requirement]:
    """What pyproject asks for on a system: the core and the given extras, by canonical name."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    found = [Requirement(line) for line in lines]
    kept = [one for one in found if one.marker is None or one.marker.evaluate({"sys_platform": system})]
    return {canonicalize_name(one.name): one for one in kept}


def listed(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith(("#", "--"))]
    return {canonicalize_name(one.name): one for one in found}


def environment() -> tuple[list[str], list[str]]:
    """The conda-forge packages and the pip lines of binder/environment.yml."""
    data = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text(encoding="utf-8"))
    assert data["channels"] == ["conda-forge", "nodefaults"]
    conda = [line for line in data["dependencies"] if isinstance(line, str)]
    (pip,) = (line["pip"] for line in data["dependencies"] if isinstance(line, dict))
    return conda, pip


def same(given: dict[str, Requirement], expected: dict[str, Requirement]) -> list[str]:
    names = sorted(given.keys() ^ expected.keys())
    differ = [n for n in given.keys() & expected.keys() if given[n].specifier != expected[n].specifier]
    differ += [n for n in given.keys() & expected.keys() if given[n].extras != expected[n].extras]
    return names + differ


def test_binder_installs_what_pyproject_asks_for():
    conda, pip = environment()
    packages = listed([line for line in conda if line != "pip" and not line.startswith("python=")] + pip)
    assert not same(packages, wanted(*CLASS_EXTRAS))
    python = next(line for line in conda if line.startswith("python=")).removeprefix("python=")
    assert f">={python}" == PROJECT["requires-python"]


def test_binder_compiles_nothing():
    """Only llama-cpp-python has no wheel on PyPI; Binder may take nothing but a wheel of it, from its maintainer."""
    _, pip = environment()
    assert "--only-binary=llama-cpp-python" in pip
    assert any("llama-cpp-python/whl/cpu" in line for line in pip) and any("pytorch.org/whl/cpu" in line for line in pip)


def test_repo2docker_finds_and_renders_the_image(monkeypatch):
    pytest.importorskip("repo2docker", reason="repo2docker is not installed: pip install jupyter-repo2docker.")
    from repo2docker.app import Repo2Docker
    from repo2docker.buildpacks import CondaBuildPack

    monkeypatch.chdir(ROOT)
    app = Repo2Docker()
    pack = next(pack for kind in app.buildpacks if (pack := kind(base_image=app.base_image)).detect())
    assert type(pack) is CondaBuildPack
    pack.platform = "linux/amd64"
    text = pack.render({"NB_USER": "jovyan", "NB_UID": "1000"})
    assert pack.python_version == "3.11"
    assert pack.get_post_build_scripts() == ["binder/postBuild"]
    assert 'ENV R2D_ENTRYPOINT="${REPO_DIR}/binder/start"' in text and "RUN ./binder/postBuild" in text
    # the packages are a layer of their own, so that a change of a notebook does not install them again
    assert text.index('--file "binder/environment.yml"') < text.index("COPY --chown=1000:1000 src/ ${REPO_DIR}")


def test_post_build_installs_labkit_alone_and_looks_at_it():
    text = (ROOT / "binder" / "postBuild").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert commands[0] == "set -euo pipefail"  # a step that fails must fail the build
    assert "--no-deps" in commands[1] and commands[1].endswith(" .") and commands[2] == "python -m labkit doctor"


@pytest.mark.skipif(sys.platform == "win32", reason="Binder's scripts run on Linux.")
@pytest.mark.parametrize("name", ["postBuild", "start"])
def test_binder_scripts_can_be_run(name: str):
    script = ROOT / "binder" / name
    assert os.access(script, os.X_OK) and script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Binder's scripts run on Linux.")
def test_start_limits_the_threads_and_hands_over(tmp_path: Path):
    from labkit import host

    (tmp_path / "python").symlink_to(sys.executable)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    done = subprocess.run([ROOT / "binder" / "start", sys.executable, "-c", code], env=env, capture_output=True, text=True)
    set_by_start = json.loads(done.stdout)
    assert set_by_start["OMP_NUM_THREADS"] == str(host.cpus()) and set_by_start["OMP_WAIT_POLICY"] == "passive"


# --- Colab -------------------------------------------------------------------------------------------------------


def test_colab_takes_the_light_set():
    lines = (ROOT / "binder" / "colab.txt").read_text(encoding="utf-8").splitlines()
    light = {name: one for name, one in wanted("llamacpp").items() if name not in SERVER}
    assert not same(listed(lines), light)


def test_labkit_starts_a_lab_without_the_notebook_server(home: Path):
    """What Colab's set leaves out must not be imported by a lab's first cells."""
    code = (
        "import sys\n"
        f"class No:\n def find_spec(self, name, *_):\n  if name.split('.')[0] in {SERVER - {'ipykernel'}!r}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        "import labkit\n"
        "labkit.start('00'); labkit.quiz('00'); labkit.checkpoint('edgehome').encode('on')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr


# --- Codespaces --------------------------------------------------------------------------------------------------

COMMAND = {"type": ["string", "array", "object"], "items": {"type": "string"}}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
# The part of the dev container format that this project uses, from its public description; anything else is refused.
DEVCONTAINER = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "image": {"type": "string"},
        "features": {"type": "object", "additionalProperties": {"type": "object"}},
        "remoteUser": {"type": "string"},
        "hostRequirements": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "cpus": {"type": "integer", "minimum": 1},
                "memory": {"type": "string", "pattern": r"^\d+([tgmk]b)?$"},
                "storage": {"type": "string", "pattern": r"^\d+([tgmk]b)?$"},
            },
        },
        "containerEnv": STRINGS,
        **dict.fromkeys(("onCreateCommand", "updateContentCommand", "postCreateCommand", "postAttachCommand"), COMMAND),
        "customizations": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "codespaces": {"type": "object", "properties": {"openFiles": {"type": "array", "items": {"type": "string"}}}},
                "vscode": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "extensions": {"type": "array", "items": {"type": "string", "pattern": r"^[\w-]+\.[\w-]+$"}},
                        "settings": {"type": "object"},
                    },
                },
            },
        },
    },
}


def test_the_dev_container():
    import jsonschema

    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8")
    container = json.loads(text)
    jsonschema.validate(container, DEVCONTAINER)
    assert re.search(r"python:3\.11-slim", container["image"])
    assert "[all]" in container["updateContentCommand"]
    (opened,) = container["customizations"]["codespaces"]["openFiles"]
    # the copy that the install command makes
    assert container["updateContentCommand"].endswith("labkit new 00") and (folder() / Path(opened).name).is_file()
    assert opened == "work/00_start_here.ipynb"
    for wrong in ({"imge": "python"}, {"image": "x", "postBuild": "y"}, {"image": "x", "hostRequirements": {"memory": "4 gigs"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, DEVCONTAINER)


# --- GitHub's workflows ------------------------------------------------------------------------------------------


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.name)
def workflow(request) -> dict:
    return yaml.safe_load(request.param.read_text(encoding="utf-8"))


def test_workflows_follow_githubs_schema(workflow):
    vendor = pytest.importorskip(
        "check_jsonschema.builtin_schemas.vendor", reason="check-jsonschema is not installed: pip install check-jsonschema."
    )
    import jsonschema

    schema = json.loads((Path(vendor.__file__).parent / "github-workflows.json").read_text(encoding="utf-8"))
    # YAML 1.1 reads the key `on` as true; JSON writes it as a name again
    jsonschema.Draft7Validator(schema).validate({"on" if key is True else key: value for key, value in workflow.items()})


def runs(workflow: dict) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_workflows_use_commands_and_extras_that_exist(workflow):
    text = "\n".join(runs(workflow))
    parser = cli.parser()
    (commands,) = (action.choices for action in parser._actions if hasattr(action, "choices") and action.choices)
    asked = re.findall(r"(?:^|[ /])labkit ([a-z][a-z-]+)", text, re.M)
    assert asked and set(asked) <= set(commands)
    extras = {name for found in re.findall(r"\.\[([\w,]+)\]", text) for name in found.split(",")}
    assert extras <= set(PROJECT["optional-dependencies"])


def test_workflows_may_only_read_but_to_publish(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    more = {name for name, job in workflow["jobs"].items() if "permissions" in job}
    assert more <= {"publish"} and all("timeout-minutes" in job or name in more for name, job in workflow["jobs"].items())


def test_the_three_systems_and_the_night():
    tests, nightly = (
        yaml.safe_load((ROOT / ".github/workflows" / name).read_text(encoding="utf-8")) for name in ("tests.yml", "nightly.yml")
    )
    assert [os.split("-")[0] for os in tests["jobs"]["test"]["strategy"]["matrix"]["os"]] == ["ubuntu", "macos", "windows"]
    metal = next(step for step in tests["jobs"]["test"]["steps"] if "metal" in step.get("run", ""))
    assert metal["if"] == "runner.os == 'macOS'"
    text = "\n".join(runs(nightly))
    assert "labkit run --profile class" in text and "--memory 2g" in text and "--cpus 1" in text
    sets = nightly["jobs"]["packages"]["strategy"]["matrix"]["include"]
    assert {one["set"]: one["resolution"] for one in sets} == {"oldest": "lowest-direct", "newest": "highest"}
    assert PROJECT["requires-python"] == f">={sets[0]['python']}" and "schedule" in nightly[True]


# --- badges ------------------------------------------------------------------------------------------------------


def repository() -> str:
    """owner/name on GitHub, from pyproject's project urls; empty while none is named."""
    found = re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)/?", PROJECT.get("urls", {}).get("Repository", ""))
    return found.group(1) if found else ""


def badges(name: str) -> str:
    first = "notebooks/00_start_here.ipynb"
    shown = (
        ("Binder", "https://mybinder.org/badge_logo.svg", f"https://mybinder.org/v2/gh/{name}/HEAD?urlpath=lab/tree/{first}"),
        ("Codespaces", "https://github.com/codespaces/badge.svg", f"https://codespaces.new/{name}"),
        ("Colab", "https://colab.research.google.com/assets/colab-badge.svg",
         f"https://colab.research.google.com/github/{name}/blob/HEAD/{first}"),
    )  # fmt: skip
    return "\n".join(f"[![Open in {where}]({image})]({link})" for where, image, link in shown)


def colab_cell(name: str) -> str:
    short = name.split("/")[1]
    return (
        f"!git clone --quiet --depth 1 https://github.com/{name}\n"
        f"%pip install --quiet -r {short}/binder/colab.txt\n"
        f"%pip install --quiet --no-deps ./{short}"
    )


def test_readme_has_the_badges_and_the_colab_cell():
    name = repository()
    if not name:
        pytest.skip("pyproject.toml names no repository under [project.urls], so there is nothing to link to.")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert badges(name) in text and colab_cell(name) in text, "run: python tests/test_platforms.py"


if __name__ == "__main__":
    name = repository() or "OWNER/NAME"
    print(f"{badges(name)}\n\n```python\n{colab_cell(name)}\n```")
