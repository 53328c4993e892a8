"""Prompt templates: parts against Jinja, against the house's own template, against the Phi family's; and where parts do not suffice."""

import pytest

import labkit
from labkit import phi
from labkit import prompt_templates as pt
from labkit.types import LabkitError

SAME = [family for family in pt.PARTS]


@pytest.mark.parametrize("family", SAME)
def test_parts_and_jinja_agree_on_what_parts_can_say(family):
    trimmed = [[{**m, "content": m["content"].strip()} for m in probe] for probe in pt.PROBES]
    assert pt.differences(pt.PARTS[family], lambda messages: pt.render_jinja(family, messages), trimmed) == []


def test_what_parts_cannot_say_is_found():
    (trims,) = pt.differences(pt.PARTS["llama-3"], lambda m: pt.render_jinja("llama-3", m))
    assert trims.startswith("conversation 3")
    speaks = pt.differences(pt.PARTS["qwen"], lambda m: pt.render_jinja("qwen-2.5", m))
    assert [line[:14] for line in speaks] == ["conversation 0", "conversation 2", "conversation 3"]  # those without a system message


@pytest.mark.parametrize("member", ["phi-3.5-mini", "phi-4-mini", "phi-4"])
def test_phi_as_the_phi_labs_have_it(member):
    for messages in pt.PROBES:
        assert pt.render(pt.PARTS[member], messages) == phi.chat(messages, member)


def test_the_house_model_speaks_chatml():
    house = labkit.checkpoint("edgehome")
    assert pt.differences(pt.PARTS["qwen"], house) == []
    assert len(pt.differences(pt.PARTS["phi-4-mini"], house)) == len(pt.PROBES)


def test_a_prefix_differs_at_its_end():
    assert "character 3" in pt.differences({"begin": "", "user": "{Content}", "answer": ""}, lambda m: "abcd", [[{"role": "user", "content": "abc"}]])[0]


@pytest.mark.parametrize("family", SAME)
def test_inference_model_and_back(family):
    document = pt.inference_model("x", pt.PARTS[family])
    assert document["Name"] == "x" and document["PromptTemplate"]["prompt"].count("{Content}") == 1
    assert pt.from_inference_model(document) == pt.PARTS[family]
    one = [{"role": "user", "content": "turn on the lamp"}]
    assert document["PromptTemplate"]["prompt"].replace("{Content}", one[0]["content"]) == pt.render(pt.PARTS[family], one)


def test_refusals():
    with pytest.raises(LabkitError, match="'tool'"):
        pt.render(pt.PARTS["qwen"], [{"role": "tool", "content": "x"}])
    with pytest.raises(LabkitError, match="'gemma'"):
        pt.render_jinja("gemma", pt.PROBES[0])
    with pytest.raises(LabkitError, match=r"PromptTemplate\.user"):
        pt.from_inference_model({"PromptTemplate": {"user": "<|user|>", "prompt": "{Content}"}})
