"""Render a checkpoint's chat template in a sandbox: a template is text from a stranger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from labkit._files import read_json
from labkit.types import LabkitError


def render(folder: Path, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **extra: Any) -> str:
    """Text of `messages` in the template of the checkpoint in `folder`; LabkitError when it refuses them."""
    from jinja2 import TemplateError

    source = template(folder)
    if source is None:
        raise LabkitError(f"{folder} has no chat template; encode plain text instead of calling chat().")
    variables = {**special_tokens(folder), "messages": list(messages), **extra}
    try:
        return _compiled(source).render(**variables, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError) as error:
        raise LabkitError(f"The chat template of {folder} refuses these messages: {error}") from None


def template(folder: Path) -> str | None:
    """Source of the chat template: chat_template.jinja, else the one in tokenizer_config.json, else None."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    value = _settings(folder).get("chat_template")
    if isinstance(value, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in value}
        return named.get("default", next(iter(named.values()), None))
    return value


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token and the like, as tokenizer_config.json spells them."""
    found = {}
    for key, value in _settings(folder).items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(file, "Tokenizer settings") if file.exists() else {}


@lru_cache(maxsize=32)
def _compiled(source: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        from jinja2 import TemplateError

        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)
