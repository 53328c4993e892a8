"""One gateway, one base, several adapters: each request is answered with the one it names, also when they come together."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

import labkit
from labkit import LabkitError, Recipe, adapters
from labkit._files import write_json
from labkit.serve import command

pytest.importorskip("llama_cpp")
pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

from live_gateway import live  # noqa: E402

PROMPT = "Turn on the light in the kitchen"


@pytest.fixture(scope="module")
def artifact():
    return labkit.build(labkit.checkpoint("edgehome"), Recipe("llamacpp", "q8_0"))


@pytest.fixture(scope="module")
def folders(artifact, tmp_path_factory):
    """Two adapters of random values, in PEFT's format and without PEFT."""
    from safetensors.numpy import save_file

    made = {}
    for seed, name in enumerate(("loud", "quiet")):
        made[name] = tmp_path_factory.mktemp(name)
        random, tensors = np.random.default_rng(seed), {}
        for path, view in artifact.checkpoint.tensors().items():
            if path.endswith(("v_proj.weight", "down_proj.weight")):
                for kind, shape in (("A", (4, view.shape[1])), ("B", (view.shape[0], 4))):
                    tensors[f"base_model.model.{path.removesuffix('weight')}lora_{kind}.weight"] = random.normal(
                        0, 0.4, shape
                    ).astype(np.float32)
        save_file(tensors, made[name] / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["v_proj", "down_proj"], "bias": "none"}
        write_json(made[name] / "adapter_config.json", config)
    return made


def test_requests_that_come_together_get_the_adapter_they_name(artifact, folders):
    opened = partial(adapters.load, artifact, folders, threads=1)
    with opened() as runner:
        begin = [artifact.checkpoint.bos_id] if artifact.checkpoint.bos_id is not None else []
        ids = begin + artifact.checkpoint.encode(PROMPT)
        alone = {}
        for name in (None, *folders):
            runner.use(name)
            alone[name] = artifact.checkpoint.decode(list(runner.generate(ids, 12)), special=False)
    assert len(set(alone.values())) == 3
    asked = [None, "loud", "quiet", "loud", None, "quiet", "quiet", "loud"]
    with live(opened(), adapters=folders) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        listed = [card["id"] for card in http.get("/v1/models").json()["data"]]
        assert listed == ["edgehome", "edgehome:loud", "edgehome:quiet"]

        def ask(name):
            model = f"edgehome:{name}" if name else "edgehome"
            said = http.post("/v1/completions", json={"model": model, "prompt": PROMPT, "max_tokens": 12}).json()
            assert said["model"] == model
            return said["choices"][0]["text"]

        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(ask, asked))
        missing = http.post("/v1/completions", json={"model": "edgehome:deep", "prompt": PROMPT})
    for name, answer in zip(asked, answers, strict=True):
        assert alone[name].startswith(answer)  # an answer may end at the end-of-text id
    assert missing.status_code == 404 and "'edgehome:quiet'" in missing.json()["error"]["message"]


def test_an_adapter_on_the_command_line_is_name_and_folder():
    assert command._adapters(["a=x", "b=y=z"]) == {"a": "x", "b": "y=z"}
    with pytest.raises(LabkitError, match="expected NAME=FOLDER"):
        command._adapters(["folder"])
