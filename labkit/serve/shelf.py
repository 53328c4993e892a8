"""The models an Ollama-style server knows: the one it serves, and what was made from it by /api/create. All in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from labkit.serve import modelfile
from labkit.serve.served import Refused, Served
from labkit.types import LabkitError

MOST_MODELS = 100  # made with /api/create


@dataclass(frozen=True)
class Variant:
    """A name for the served model and what it begins with."""

    name: str
    made: datetime
    system: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    license: tuple[str, ...] = ()

    def modelfile(self, base: str) -> str:
        """What /api/create would need to make it again."""
        return modelfile.build(base, system=self.system, parameters=self.parameters, messages=self.messages)


class Shelf:
    """The names this server knows: the model itself and what was made from it."""

    def __init__(self, served: Served):
        self.base = Variant(tagged(served.name), datetime.now(UTC))
        self.all = {self.base.name: self.base}

    def find(self, name: str) -> Variant:
        if found := self.all.get(tagged(name)):
            return found
        raise Refused(404, f"model '{name}' not found; /api/tags lists what there is")

    def keep(self, variant: Variant) -> None:
        if variant.name == self.base.name:
            raise Refused(409, f"{variant.name} is the served model itself; take another name.")
        try:
            variant.modelfile(self.base.name)
        except LabkitError as error:
            raise Refused(400, str(error)) from None
        if variant.name not in self.all and len(self.all) > MOST_MODELS:
            raise Refused(409, f"There are {MOST_MODELS} made models already; delete one first.")
        self.all[variant.name] = variant

    def drop(self, name: str) -> None:
        if self.find(name) is self.base:
            raise Refused(409, f"{name} is the served model itself; it goes when the server stops.")
        del self.all[tagged(name)]


def tagged(name: str) -> str:
    """Ollama's full name: `latest` is the tag when none is written."""
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"
