"""labkit: convert one checkpoint for four engines, quantize it, and measure it honestly."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# These functions share their module's name, so they are bound here once, before anything else can
# bind the module instead. None of these modules imports anything heavy.
from labkit.build import build, load
from labkit.checkpoint import checkpoint
from labkit.ledger import ledger
from labkit.standin import standin
from labkit.types import LabkitError, Recipe

# name -> module it lives in, resolved on first use so that `import labkit` stays light
_LATER = {
    "available": "engines",
    "show": "charts",
    "start": "course.session",
    "check": "course.exercises",
    "hint": "course.exercises",
    "quiz": "course.quizzes",
    "progress": "course.overview",
    "glossary": "terms",
}
__all__ = ["LabkitError", "Recipe", "build", "checkpoint", "ledger", "load", "measure", "standin", *_LATER]


def __getattr__(name: str) -> Any:
    if name in ("measure", "house"):
        return import_module(f"labkit.{name}")
    if name in _LATER:
        return getattr(import_module(f"labkit.{_LATER[name]}"), name)
    raise AttributeError(f"module 'labkit' has no attribute {name!r}")
