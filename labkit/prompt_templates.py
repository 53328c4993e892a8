"""Prompt templates of the families Qwen, Phi and Llama 3: in parts, as inference_model.json has them, and as Jinja.

`PARTS` is how the first generation of Foundry Local kept a template: a text for each role with {Content} in it, and what
opens the answer. `JINJA` is how a checkpoint keeps it. The parts cannot say everything Jinja can; `differences` renders both
and shows where they part. Sources: tokenizer_config.json of Qwen/Qwen2.5-0.5B-Instruct, Qwen/Qwen3-0.6B,
microsoft/Phi-3.5-mini-instruct, microsoft/Phi-4-mini-instruct, microsoft/phi-4, meta-llama/Meta-Llama-3-8B-Instruct;
their paths for tools and for thinking are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labkit import _chat
from labkit.checkpoint import Checkpoint
from labkit.i18n import tr
from labkit.types import LabkitError

CONTENT = "{Content}"
ROLES = ("system", "user", "assistant")
Messages = Sequence[Mapping[str, str]]


def _parts(turn: str, answer: str, begin: str = "") -> dict[str, str]:
    """A template whose turns differ in the role's name only; `turn` has {role} in it."""
    return {"begin": begin, **{role: turn.replace("{role}", role) for role in ROLES}, "answer": answer}


PARTS: Mapping[str, Mapping[str, str]] = {
    "qwen": _parts("<|im_start|>{role}\n{Content}<|im_end|>\n", "<|im_start|>assistant\n"),
    "phi-3.5-mini": _parts("<|{role}|>\n{Content}<|end|>\n", "<|assistant|>\n"),
    "phi-4-mini": _parts("<|{role}|>{Content}<|end|>", "<|assistant|>"),
    "phi-4": _parts("<|im_start|>{role}<|im_sep|>{Content}<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
    "llama-3": _parts(
        "<|start_header_id|>{role}<|end_header_id|>\n\n{Content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|begin_of_text|>",
    ),
}  # fmt: skip
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_LOOP = "{% for message in messages %}BODY{% endfor %}{% if add_generation_prompt %}ANSWER{% endif %}"
_CHATML = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
JINJA: Mapping[str, str] = {
    "qwen": _LOOP.replace("BODY", _CHATML).replace("ANSWER", "{{ '<|im_start|>assistant\n' }}"),  # Qwen3
    "qwen-2.5": (  # says who it is when nobody tells it
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n' }}{% endif %}"
        + _LOOP.replace("BODY", _CHATML).replace("ANSWER", "{{ '<|im_start|>assistant\n' }}")
    ),
    "phi-3.5-mini": _LOOP.replace("BODY", "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}").replace(
        "ANSWER", "{{ '<|assistant|>\n' }}"
    ),
    "phi-4-mini": _LOOP.replace("BODY", "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}").replace(
        "ANSWER", "{{ '<|assistant|>' }}"
    ),
    "phi-4": _LOOP.replace(
        "BODY", "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    ).replace("ANSWER", "{{ '<|im_start|>assistant<|im_sep|>' }}"),
    "llama-3": "{{ bos_token }}"  # and it trims what was said
    + _LOOP.replace(
        "BODY",
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}",
    ).replace("ANSWER", "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"),
}
TOKENS = {"llama-3": {"bos_token": "<|begin_of_text|>"}}  # what the Jinja of a family reads beside the messages
PROBES: Sequence[Messages] = (  # conversations in which templates are known to differ
    [{"role": "user", "content": "turn on the lamp"}],
    [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": "turn on the lamp"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "two"}],
    [{"role": "user", "content": "  acende a luz às 7h30 ☕\n"}],
)


def render(parts: Mapping[str, str], messages: Messages) -> str:
    """A conversation in a template of parts, ready for an answer. LabkitError for a role it has no part for."""
    said = [parts.get("begin", "")]
    for message in messages:
        if message["role"] not in parts or message["role"] not in ROLES:
            raise LabkitError(tr("The template has no part for the role {role!r}; expected one of {known}.",
                                 role=message["role"], known=", ".join(ROLES)))  # fmt: skip
        said.append(parts[message["role"]].replace(CONTENT, message["content"]))
    return "".join(said) + parts["answer"]


def render_jinja(family: str, messages: Messages) -> str:
    """The same by the family's Jinja, in the sandbox that renders checkpoints' templates."""
    if family not in JINJA:
        raise LabkitError(tr("There is no template {family!r}; expected one of {known}.", family=family, known=", ".join(JINJA)))
    return _chat._compiled(JINJA[family]).render(messages=list(messages), add_generation_prompt=True, **TOKENS.get(family, {}))


def differences(parts: Mapping[str, str], reference: Any, probes: Sequence[Messages] = PROBES) -> list[str]:
    """One line for each probe that the parts and the reference render otherwise: a checkpoint, or a function of messages."""
    rendered = reference.chat if isinstance(reference, Checkpoint) else reference
    found = []
    for number, messages in enumerate(probes):
        ours, theirs = render(parts, messages), rendered(messages)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            found.append(tr("conversation {number}, character {at}: {ours!r} where the reference has {theirs!r}",
                            number=number, at=at, ours=ours[at : at + 24], theirs=theirs[at : at + 24]))  # fmt: skip
    return found


def inference_model(name: str, parts: Mapping[str, str]) -> dict[str, Any]:
    """inference_model.json of Foundry Local's first generation: its "prompt" is one user turn and the opened answer."""
    turns = {role: parts[role] for role in ROLES}
    return {"Name": name, "PromptTemplate": {**turns, "prompt": parts.get("begin", "") + parts["user"] + parts["answer"]}}


def from_inference_model(document: Mapping[str, Any]) -> dict[str, str]:
    """The parts of an inference_model.json. LabkitError where {Content} is missing, so that the request would be lost."""
    template = document.get("PromptTemplate", {})
    for role in ("user", "prompt"):
        if CONTENT not in template.get(role, ""):
            raise LabkitError(tr("PromptTemplate.{role} is {given!r}; expected a text with {content} in it.",
                                 role=role, given=template.get(role), content=CONTENT))  # fmt: skip
    before, _, answer = template["prompt"].partition(template["user"])
    return {"begin": before, **{role: template[role] for role in ROLES if role in template}, "answer": answer}
