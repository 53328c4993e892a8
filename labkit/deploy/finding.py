"""One broken rule: where, which, what to do. Every rule has a name of its own, so that an exception can be written down."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from labkit.types import LabkitError

DEEPEST = 100  # brackets in each other: a YAML reader's time grows with their square


@dataclass(frozen=True)
class Finding:
    """A rule that a file breaks. `level`: error, warning, or accepted (an exception with a reason, written in the file)."""

    rule: str
    place: str  # service, container, instruction or job
    sentence: str
    level: str = "error"
    file: str = ""

    def at(self, file: str) -> Finding:
        return replace(self, file=file)

    def row(self) -> dict[str, str]:
        """Flat, for a table."""
        return {"level": self.level, "file": self.file, "place": self.place, "rule": self.rule, "what": self.sentence}


def read_yaml(text: str) -> list[dict[str, Any]]:
    """The documents of a YAML text that are mappings. LabkitError when it is none."""
    depth = list(accumulate((one in "[{") - (one in "]}") for one in text))
    if depth and max(depth) > DEEPEST:
        raise LabkitError(f"This YAML opens {max(depth)} brackets in each other; a file of deployment needs a dozen.")
    try:
        documents = list(yaml.load_all(text, Loader=_Once))
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise LabkitError(f"This is no YAML{line}: {getattr(error, 'problem', None) or error}; mend it there.") from None
    except RecursionError:  # by indentation
        raise LabkitError("This YAML is nested too deeply to be read; a file of deployment needs a dozen levels.") from None
    if any(one is not None and not isinstance(one, dict) for one in documents):
        raise LabkitError("This YAML is no mapping; a file of deployment is keys with values.")
    return [one for one in documents if one]


@cache
def published(name: str) -> Any:
    """A validator of one of the schemas that check-jsonschema carries; None where it is not installed."""
    spec = importlib.util.find_spec("check_jsonschema")
    file = Path(spec.origin).parent / "builtin_schemas" / "vendor" / name if spec and spec.origin else None
    if file is None or not file.exists():
        return None
    from jsonschema.validators import validator_for

    schema = json.loads(file.read_text(encoding="utf-8"))
    return validator_for(schema)(schema)


class _Once(yaml.SafeLoader):
    """Refuses a key that is given twice: YAML keeps the last and says nothing."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = getattr(key, "value", None) if key.tag != "tag:yaml.org,2002:merge" else None
            if isinstance(name, str) and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def tag_of(image: str) -> tuple[str, str, str]:
    """(repository, tag, digest) of an image's name; "" for what is not written."""
    name, _, digest = image.partition("@")
    head, slash, last = name.rpartition("/")
    repository, _, tag = last.partition(":")
    return head + slash + repository, tag, digest


def pinned(image: str, place: str) -> list[Finding]:
    """Rules of an image's name: a tag that is no moving one (error), and a digest (warning)."""
    repository, tag, digest = tag_of(image)
    if "foundry-local" in repository or "foundrylocal" in repository:
        return [Finding("image-exists", place, "There is no container image of Foundry Local; it is a library and a program for one device: take one of the other servers.")]
    if digest:
        return []
    if tag in ("", "latest", "main", "master", "stable", "dev", "nightly", "edge", "server", "cuda") or tag.startswith("latest"):
        return [Finding("pinned", place, f"{image} is another image tomorrow; name a version, and the digest you tested.")]
    if repository.startswith("labkit-"):
        return []  # built here: it has no digest before it is pushed
    return [Finding("digest", place, f"{image} can be pushed again under the same tag; add the digest: docker buildx imagetools inspect {image}", "warning")]


SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")


def looks_secret(name: str, value: Any) -> bool:
    """Whether a setting is a secret written out: a telling name, and a value that is no reference or file."""
    text = "" if value is None else str(value).strip()
    telling = any(word in name.upper() for word in SECRET_WORDS) and not name.upper().endswith(("_FILE", "_PATH"))
    return telling and bool(text) and not text.startswith("$")
