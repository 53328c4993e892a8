"""Languages: complete catalogues, the choice of a language, and editions of labs with the same code."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import ipywidgets
import nbformat
import numpy as np
import pytest

from labkit import i18n, messages, panels
from labkit.course import exercises, generate, labs, quizzes, run, session
from labkit.types import LabkitError

ROOT = Path(__file__).resolve().parents[1]
SOURCES, LEARNERS = ROOT / "tests" / "solutions", ROOT / "notebooks"
OTHERS = [code for code in i18n.LANGUAGES if code != i18n.ENGLISH]
EDITIONS = [lab for lab in labs.editions(LEARNERS) if lab.language in OTHERS]
edition = pytest.mark.parametrize("lab", EDITIONS, ids=lambda lab: f"{lab.language}/{lab.id}")


@pytest.fixture
def free(home, monkeypatch):
    """A new learner: no language set, none chosen, no notebook."""
    monkeypatch.delenv("LABKIT_LANG")
    monkeypatch.delenv("LABKIT_NOTEBOOK", raising=False)
    monkeypatch.delenv("LABKIT_PROGRESS", raising=False)
    i18n.follow(i18n.ENGLISH)
    yield home
    i18n.follow(i18n.ENGLISH)


@pytest.fixture
def portuguese(home, monkeypatch):
    monkeypatch.setenv("LABKIT_LANG", "pt_BR")


# --- catalogues --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", OTHERS)
def test_the_catalogue_is_complete(code):
    left = messages.problems(code)
    assert not left, "run  python -m labkit.messages  and translate what it names:\n" + "\n".join(left)


def test_the_texts_of_the_source_are_found():
    found = messages.source()
    assert "Replace the ... above and run the cell again." in found  # tr
    assert ("{n} bit", "{n} bits") in found  # trn
    assert "Bytes = weights * bits / 8." in found and "Megabytes from weights and bits" in found  # @exercise
    assert "KL divergence" in found  # Metric
    assert "What is a checkpoint in this course?" in found  # a quiz


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A catalogue of our own for a source of two texts."""
    monkeypatch.setattr(messages, "FOLDER", tmp_path)
    monkeypatch.setattr(messages, "source", lambda: {"one {a}": ["x.py"], ("{n} b", "{n} bs"): ["x.py"]})

    def write(body):
        head = (
            'msgid ""\nmsgstr ""\n"Plural-Forms: nplurals=2; plural=(n > 1);\\n"\n"Content-Type: text/plain; charset=utf-8\\n"\n'
        )
        (tmp_path / "pt_BR.po").write_text(f"{head}\n{body}\n", encoding="utf-8")
        return messages.problems("pt_BR")

    return write


PLURAL = 'msgid "{n} b"\nmsgid_plural "{n} bs"\nmsgstr[0] "{n} B"\nmsgstr[1] "{n} Bs"\n\n'


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (PLURAL, "missing: 'one {a}'"),
        (PLURAL + 'msgid "one {a}"\nmsgstr ""', "not translated: 'one {a}'"),
        (PLURAL + '#, fuzzy\nmsgid "one {a}"\nmsgstr "um {a}"', "not translated: 'one {a}'"),
        (PLURAL + 'msgid "one {a}"\nmsgstr "um {b}"', "other placeholders in 'um {b}'"),
        (PLURAL.replace('"{n} Bs"', '"Bs"') + 'msgid "one {a}"\nmsgstr "um {a}"', "other placeholders in 'Bs'"),
        (PLURAL + 'msgid "one {a}"\nmsgstr "um {a}"\n\nmsgid "old"\nmsgstr "velho"', "no longer in the source: 'old'"),
    ],
)
def test_a_catalogue_out_of_step_is_told(small, body, problem):
    assert small(PLURAL + 'msgid "one {a}"\nmsgstr "um {a}"') == []
    assert small(body) == [problem]


def test_updating_adds_and_drops_and_keeps(small, tmp_path):
    small('msgid "one {a}"\nmsgstr "um {a}"\n\nmsgid "old"\nmsgstr "velho"')
    messages.update("pt_BR")
    assert messages.problems("pt_BR") == ["not translated: ('{n} b', '{n} bs')"]
    first = (tmp_path / "pt_BR.po").read_text(encoding="utf-8")
    messages.update("pt_BR")
    assert (tmp_path / "pt_BR.po").read_text(encoding="utf-8") == first and "um {a}" in first


@pytest.mark.parametrize("call", ['tr(f"a {b}")', 'tr("a " + b)', 'trn("x", "y" % b, 2)'])
def test_a_text_that_is_put_together_cannot_be_translated(tmp_path, call):
    (tmp_path / "x.py").write_text(call)
    with pytest.raises(LabkitError, match=r"x.py:1: .*plain literal"):
        list(messages._python(tmp_path / "x.py", "x.py"))


# --- which language ----------------------------------------------------------------------------------------------


def test_the_language_is_that_of_the_environment_then_the_choice_then_the_notebook(free, monkeypatch):
    assert i18n.language() == "en" and i18n.tr("yes") == "yes"
    i18n.follow("pt_BR")
    assert i18n.language() == "pt_BR" and i18n.tr("yes") == "sim"
    i18n.choose("en")
    assert i18n.language() == "en"
    monkeypatch.setenv("LABKIT_LANG", "pt-br")
    assert i18n.language() == "pt_BR"
    with i18n.speaking("en"):
        assert i18n.tr("yes") == "yes"


def test_the_choice_is_kept_for_the_next_kernel(free):
    i18n.choose("pt_BR")
    i18n.follow("en")  # what a new start cell does; it reads the file again
    assert i18n.language() == "pt_BR" and "pt_BR" in (free / "progress.json").read_text(encoding="utf-8")


def test_a_home_that_cannot_be_read_does_not_silence_messages(free, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "file"))
    assert i18n.tr("yes") == "yes"


def test_damaged_settings_are_put_aside(free):
    free.mkdir(parents=True)
    (free / "progress.json").write_text('{"exercises": {}, "quizzes": {}, "settings": []}')
    assert i18n.language() == "en" and (free / "progress.json.broken").exists()


@pytest.mark.parametrize("name", ["pt_BR", "pt-BR", "PT", "pt_BR.UTF-8"])
def test_a_language_goes_by_several_names(name):
    assert i18n.known(name) == "pt_BR"


def test_an_unknown_language_names_the_known_ones(monkeypatch):
    monkeypatch.setenv("LABKIT_LANG", "tlh")
    with pytest.raises(LabkitError, match=r"no language 'tlh'; .*en \(English\), pt_BR \(Português"):
        i18n.tr("yes")


def test_plurals_and_placeholders(portuguese):
    assert [i18n.trn("{n} bit", "{n} bits", n) for n in (1, 4)] == ["1 bit", "4 bits"]
    assert i18n.tr("{bits:.2f} bits per weight", bits=4.5) == "4.50 bits por peso"
    assert i18n.tr("not in the catalogue {x}") == "not in the catalogue {x}"


# --- what a learner sees -----------------------------------------------------------------------------------------


def test_checks_and_hints_speak_portuguese(portuguese):
    assert repr(exercises.check("00.1", ...)) == "00.1: não iniciado. Substitua os ... acima e execute a célula de novo."
    verdict = exercises.check("00.1", lambda weights, bits: weights * bits)
    assert verdict.state == "not yet" and "esperava-se" in verdict.message and "Uma nova dica" in verdict.message
    assert "00.1: ainda não" in verdict._repr_html_() and "lang='pt-BR'" in verdict._repr_html_()
    shown = exercises.hint("00.1")
    assert repr(shown).startswith("Dica 1: Um peso de 32 bits ocupa 4 bytes") and "Dicas para 00.1" in shown._repr_html_()


@pytest.mark.parametrize("name", sorted(exercises.exercises()))
def test_no_english_in_what_a_portuguese_learner_is_told(portuguese, name):
    answers = ["x", 3, [1, 2], {"a": 1}, np.zeros((2, 2)), lambda *_: "x", lambda *_: 5, lambda *_: np.zeros(3), lambda *_: 1 / 0]
    said = " ".join(exercises.judge(name, answer).message for answer in answers)
    said = re.sub(r"<lambda>\(.*?(?=: esperava-se| lançou|$)|'[^']*'|b'[^']*'", "", said)  # cases and values are the house's, in English too
    assert said and not re.search(r"\b(expected|got|differ|difference|raised|missing|the)\b", said), said


def test_the_quiz_speaks_portuguese_as_text_and_as_form(portuguese):
    asked = quizzes.read("00")
    assert "O que é um checkpoint neste curso?" in repr(asked) and "Resposta e explicações" in asked._repr_html_()
    _, _, button, said = panels.quiz(asked).children[0].children
    button.click()
    assert button.description == "Verificar" and "Escolha uma opção primeiro." in said.value


def test_panels_speak_portuguese(portuguese):
    panel = panels.matrix(np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32))
    controls = {child.description: child for child in panel.children if getattr(child, "description", "")}
    assert list(controls) == ["bits por código", "uma escala por", "tamanho do grupo", "esquema"]
    controls["uma escala por"].value = "tensor"  # values stay what the code calls them
    assert "bits por peso armazenados" in _first(panel, ipywidgets.HTML).value
    drawn = _first(panel, ipywidgets.Output).outputs[0]["data"]["application/vnd.plotly.v1+json"]
    assert drawn["layout"]["title"]["text"] == "Os pesos e os valores que eles podem assumir"


def _first(panel, kind):
    return next(child for child in panel.children if isinstance(child, kind))


@pytest.fixture
def shown(monkeypatch):
    """What was displayed, and what was put in its place later."""
    found = []

    class Handle:
        def update(self, new):
            found[0] = new

    monkeypatch.setattr("IPython.display.display", lambda one, **_: found.append(one) or Handle())
    return found


def test_the_start_cell_offers_a_language_and_remembers_it(free, shown):
    session.start("00")
    table, form = shown
    choice, said = _first(form, ipywidgets.Dropdown), _first(form, ipywidgets.HTML)
    assert "Lab 00 on this machine" in table._repr_html_() and choice.description == "Language / Idioma"
    assert dict(choice.options) == {"English": "en", "Português (Brasil)": "pt_BR"} and choice.value == "en"
    choice.value = "pt_BR"
    assert "Laboratório 00 nesta máquina" in shown[0]._repr_html_() and "fala português" in said.value
    del shown[:]
    session.start("module04/01")
    assert "idioma: Português (Brasil)" in repr(shown[0]) and _first(shown[1], ipywidgets.Dropdown).value == "pt_BR"


@pytest.mark.parametrize("settled", ["LABKIT_LANG", "LABKIT_NOTEBOOK"])
def test_nothing_is_asked_where_nobody_chooses(free, shown, monkeypatch, settled):
    monkeypatch.setenv(settled, {"LABKIT_LANG": "pt", "LABKIT_NOTEBOOK": str(EDITIONS[0].path)}[settled])
    session.start(EDITIONS[0].id)
    assert len(shown) == 1 and "nesta máquina" in shown[0]._repr_html_()  # the notebook's own language is followed


# --- editions of labs --------------------------------------------------------------------------------------------


def test_the_editions_that_were_promised_are_there():
    assert {("pt_BR", "00"), ("pt_BR", "module04/01")} <= {(lab.language, lab.id) for lab in EDITIONS}


@edition
def test_an_edition_has_the_same_code(lab):
    english = labs.find(lab.relative.relative_to(lab.language).as_posix(), LEARNERS)
    ours, theirs = (nbformat.read(one.path, as_version=4) for one in (lab, english))
    assert [(c.id, c.cell_type, c.metadata) for c in ours.cells] == [(c.id, c.cell_type, c.metadata) for c in theirs.cells]
    for mine, other in zip(ours.cells, theirs.cells, strict=True):
        if mine.cell_type == "code":
            assert mine.source == other.source, mine.id
        else:
            assert mine.source != other.source or len(other.source.split()) < 3, f"{mine.id} is still English"
            spans = re.findall(r"`[^`\n]+`", re.sub(r"<!--.*", "", other.source, flags=re.S))
            assert set(spans) <= set(re.findall(r"`[^`\n]+`", mine.source)), f"{mine.id}: code in the text differs"
    assert ours.metadata.labkit == theirs.metadata.labkit | {"language": lab.language}


def test_no_translation_has_fallen_behind():
    assert generate.behind(SOURCES) == []


def test_a_translation_that_falls_behind_is_named(tmp_path):
    source = tmp_path / "tests" / "solutions"
    shutil.copytree(SOURCES, source, ignore=shutil.ignore_patterns("module*"))
    notebook = nbformat.read(source / "00_start_here.ipynb", as_version=4)
    by_id = {cell.id: cell for cell in notebook.cells}
    by_id["ready"].source += " And more."
    notebook.cells.append(nbformat.v4.new_markdown_cell("New.", id="new"))
    notebook.cells.remove(by_id["model"])
    nbformat.write(notebook, source / "00_start_here.ipynb")
    told = "\n".join(generate.behind(source))
    assert "cell ready has changed" in told and generate.mark(by_id["ready"].source) in told
    assert "cell new is not translated" in told and "no text cell model any more" in told
    assert len(told.splitlines()) == 3
    made = generate.learner(generate.course(source, "pt_BR")[0])
    assert made.cells[-1].source == "New.", "what is not translated stays English"


@edition
def test_links_of_an_edition_lead_somewhere(lab):
    for cell in nbformat.read(lab.path, as_version=4).cells:
        for target in re.findall(r"\]\(([^)\s]+)\)", cell.source) if cell.cell_type == "markdown" else []:
            file, _, anchor = target.partition("#")
            path = (lab.path.parent / file).resolve() if file else lab.path
            assert path.is_file(), f"{cell.id}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.+)$", "\n".join(c.source for c in nbformat.read(path, 4).cells), re.M)
                assert anchor in [head.strip().replace(" ", "-") for head in heads], f"{cell.id}: {target}"


@edition
def test_an_edition_and_the_english_lab_link_to_each_other(lab):
    english = labs.find(lab.relative.relative_to(lab.language).as_posix(), LEARNERS)
    for here, there in ((lab, english), (english, lab)):
        first = nbformat.read(here.path, as_version=4).cells[0].source
        name = i18n.LANGUAGES[there.language]
        target = re.search(rf"\[{re.escape(name)}\]\(([^)]+)\)", first).group(1)
        assert (here.path.parent / target).resolve() == there.path


def test_one_edition_of_each_lab_is_taken(monkeypatch):
    english = labs.labs(LEARNERS)
    monkeypatch.setenv("LABKIT_LANG", "pt_BR")
    found = labs.labs(LEARNERS)
    assert [lab.id for lab in found] == [lab.id for lab in english]
    assert {lab.id for lab in found if lab.language == "pt_BR"} == {lab.id for lab in EDITIONS if lab.language == "pt_BR"}
    assert labs.find("module04/01", LEARNERS).relative.parts[0] == "pt_BR"
    assert labs.find("notebooks/00_start_here.ipynb", LEARNERS).language == "en", "a path means that file"
    assert all(lab.language == "en" for lab in labs.labs(SOURCES))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_edition_runs_headless_in_its_language(home, tmp_path, monkeypatch):
    """One of them: the others have the same code as the English labs, which are all run."""
    monkeypatch.setenv("LABKIT_LANG", "pt_BR")
    outcome = run.run(["00"], out=tmp_path / "out", headline=False)
    (record,) = outcome.results["labs"]
    assert record["status"] == "passed" and record["notebook"] == "pt_BR/00_start_here.ipynb", record["failed"]
    assert set(record["exercises"].values()) == {"not started"}
    page = (outcome.folder / record["html"]).read_text(encoding="utf-8")
    assert "nesta máquina" in page and "não iniciado" in page and "Resposta e explicações" in page
    assert "<div lang='pt-BR'>" in page
