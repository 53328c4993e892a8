"""Terms of teachers: complete, sourced, and answered for what is asked."""

from __future__ import annotations

import pytest

from labkit.train import licences
from labkit.types import LabkitError

NAMED = (
    "DeepSeek-V3",
    "Llama 3.1 405B",
    "Llama 3.1 8B",
    "GPT-4",
    "Claude 3.5 Sonnet",
    "Phi-4-mini",
    "Phi-3.5-mini",
)  # by the chapter


@pytest.mark.parametrize("one", licences.teachers(), ids=lambda one: one.teacher)
def test_terms_are_complete(one):
    assert one.kind in ("weights", "service") and one.outputs in licences.OUTPUTS and one.licence
    assert bool(one.duty) == (one.outputs != "free")
    assert one.source.startswith("https://") or one.teacher == "edgehome"


def test_every_teacher_the_chapter_names_is_listed():
    for name in NAMED:
        assert any(name in one.teacher for one in licences.teachers()), name


def test_a_service_refuses_rivals_only_and_the_unknown_is_not_guessed():
    assert licences.check("edgehome", general=True) == ""
    assert "Built with Llama" in licences.check("llama 3.1", general=True)
    assert "ask before you train" in licences.check("GPT-4", general=False)
    with pytest.raises(LabkitError, match="GPT-4: no model that competes"):
        licences.check("GPT-4", general=True)
    with pytest.raises(LabkitError, match="terms of Nova are not listed"):
        licences.check("Nova", general=False)
