"""What to write down about a model before it is used: an entry of a catalogue, and what an entry still lacks.

    catalog.problems(catalog.entry(labkit.checkpoint("acme/edgehome", revision=…)))

The fields are those that hubs and company catalogues agree on: identity, revision, licence, files with their digests, format,
chat template, shape. `labkit.serve.manifest` signs such a list and makes the bill of materials.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labkit._chat import template
from labkit.checkpoint import Checkpoint
from labkit.i18n import tr
from labkit.serve.manifest import digests
from labkit.standin import size_class

CODE = (".bin", ".pt", ".pth", ".pkl", ".py")  # opening these may run code: pickles and modules


def licence(folder: Path) -> str | None:
    """The licence the model card's front matter names, else "LICENSE file" when one lies there, else None."""
    card = Path(folder) / "README.md"
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL) if card.exists() else None
    found = re.search(r"^license:\s*(\S+)", head[1], re.M) if head else None
    if found:
        return found[1].strip("\"'")
    return "LICENSE file" if any(Path(folder).glob("LICEN[CS]E*")) else None


def entry(checkpoint: Checkpoint) -> dict[str, Any]:
    """The catalogue entry of a checkpoint: plain values, ready for JSON."""
    files = digests(checkpoint.path)
    return {
        "id": checkpoint.name, "revision": checkpoint.revision, "licence": licence(checkpoint.path),
        "architecture": checkpoint.architecture, "parameters": checkpoint.weights, "class": size_class(checkpoint.weights),
        "context": checkpoint.context, "chat_template": template(checkpoint.path) is not None, "files": files,
    }  # fmt: skip


def problems(entry: Mapping[str, Any]) -> list[str]:
    """Why a careful user would not deploy this entry, a sentence each; empty when nothing is amiss."""
    files, found = entry.get("files") or {}, []
    if not entry.get("licence"):
        found.append(tr("No licence is named: nobody has said that you may use it."))
    if not re.fullmatch(r"[0-9a-f]{40}", str(entry.get("revision") or "")):
        found.append(tr("The revision is no commit: a branch or a tag can be another model tomorrow."))
    if not any(name.endswith(".safetensors") for name in files):
        found.append(tr("There are no safetensors: weights in other formats may run code when they are opened."))
    for name in sorted(n for n in files if n.endswith(CODE)):
        found.append(tr("{name} can run code when it is opened; leave it out.", name=name))
    unsure = sorted(n for n, one in files.items() if not re.fullmatch(r"[0-9a-f]{64}", str(one.get("sha256") or "")))
    if unsure:
        found.append(tr("{name} has no SHA-256: a damaged or exchanged file would not be noticed.", name=unsure[0]))
    if not entry.get("chat_template"):
        found.append(tr("There is no chat template: everybody would guess how a question is put."))
    return found
