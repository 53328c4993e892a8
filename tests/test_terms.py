"""The glossary: complete entries, taught where they say, on a page that is fresh."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

import labkit
from labkit import terms
from labkit.course import labs, quizzes
from labkit.types import LabkitError

SOURCES = Path(__file__).resolve().parent / "solutions"
LABS = labs.labs(SOURCES)
IDS = [lab.id for lab in LABS]
IN_GOALS = [  # what the goals of the labs are about
    "quantization", "precision", "symmetric quantization", "affine quantization", "group", "bits per weight", "range",
    "step", "GGUF", "ONNX", "bandwidth", "checkpoint", "tensor", "importance matrix", "KL divergence", "sampling",
    "grammar", "thread", "context", "batch", "memory mapping", "KV cache",
]  # fmt: skip


def prose(lab_id):
    notebook = nbformat.read(labs.find(lab_id, SOURCES).path, as_version=4)
    return "\n".join(cell.source for cell in notebook.cells)


def goals(lab):
    return "\n".join(re.findall(r"^- .+$", nbformat.read(lab.path, as_version=4).cells[0].source, re.M))


@pytest.mark.parametrize("one", terms.terms(), ids=lambda one: one.term)
def test_an_entry_is_complete(one):
    assert one.term and one.pt and one.taught
    for meaning in (one.means, one.means_pt):
        assert meaning[0].isupper() and meaning.endswith(".") and "\n" not in meaning and "|" not in meaning
        assert not re.search(r"[.!?] [A-ZÀ-Ú]", meaning), "one sentence"
        assert 5 <= len(meaning.split()) <= 30
    assert one.means != one.means_pt


def test_terms_are_unique_in_both_languages():
    for names in ([one.term.casefold() for one in terms.terms()], [one.pt.casefold() for one in terms.terms()]):
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("lab_id", IDS)
def test_a_term_is_taught_where_it_says(lab_id):
    text = (prose(lab_id) + quizzes.read(lab_id)._repr_html_()).casefold()
    for one in terms.terms():
        if lab_id in one.taught:
            stems = [word[:4] for word in re.findall(r"[\w.]+", one.term.casefold())]
            assert all(stem in text for stem in stems), f"{one.term} is not in lab {lab_id}"


def test_terms_are_taught_in_labs_that_exist():
    assert {lab_id for one in terms.terms() for lab_id in one.taught} <= set(IDS)


def test_what_the_goals_speak_of_is_explained():
    known = {one.term for one in terms.terms()}
    assert not [term for term in IN_GOALS if term not in known]


@pytest.mark.parametrize("lab", LABS, ids=IDS)
def test_the_goals_of_every_lab_use_terms_of_the_glossary(lab):
    text = goals(lab).casefold()
    assert [one.term for one in terms.terms() if one.term.casefold().removesuffix("ization") in text], (
        f"lab {lab.id}: put what its goals are about into labkit/data/glossary.json"
    )


def test_a_term_is_found_in_either_language(monkeypatch):
    (one,) = labkit.glossary("KL divergence")
    assert one.pt == "divergência KL" and labkit.glossary("Divergência KL") == (one,)
    assert {found.term for found in labkit.glossary("quantization")} == {"quantization"}, "the exact name goes first"
    assert {found.term for found in labkit.glossary("cache")} == {"KV cache"}
    assert "How far one probability" in repr(labkit.glossary("kl")) and "<th scope='row'>" in labkit.glossary("kl")._repr_html_()
    monkeypatch.setenv("LABKIT_LANG", "pt_BR")
    assert "Quanto uma distribuição" in repr(labkit.glossary("kl"))


def test_without_a_term_all_are_shown():
    assert len(labkit.glossary()) == len(terms.terms()) >= 50


@pytest.mark.parametrize(("given", "said"), [("perplexty", "near to it: perplexity"), ("zzzz", "shows all"), ("", "shows all")])
def test_an_unknown_term_is_one_sentence(given, said):
    with pytest.raises(LabkitError, match=f"no term '{given}'; .*{said}"):
        labkit.glossary(given)


def test_the_page_holds_every_term_and_links_to_the_labs():
    page = terms.page({"00": "00_start_here.ipynb"})
    rows = [line for line in page.splitlines() if line.startswith("| **")]
    assert len(rows) == len(terms.terms()) and all(row.count(" | ") == 4 for row in rows)
    assert "[00](00_start_here.ipynb)" in page and "module04/01" in page
