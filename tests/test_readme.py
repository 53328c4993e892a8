"""README is kept true: its tree, links, commands and pictures are those of the checkout.

`python tests/test_readme.py` writes the tree again from the modules' own first lines.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

from labkit._marks import around, write_into

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OTHERS = {
    "notebooks/": "the labs as learners get them, written by `python -m labkit.course.generate`",
    "tests/": "one test file a module; `solutions/` holds the labs with their solutions, by hand",
    "binder/": "how the course is launched in Binder, and the light set for Colab",
    ".devcontainer/": "how it is launched in Codespaces and VS Code",
    ".github/workflows/": "tests on three systems, the nightly class profile, oldest and newest packages",
    "images/": "the pictures of this page",
    ".ci/run": "what continuous integration runs: the two commands above, in a fresh environment",
}
FOLDERS = {"labkit/data/": "the house model, shapes of known models, claims, quizzes, glossary, catalogues of translations, schemas, troubleshooting, clients, templates"}


def tree() -> str:
    """Every module with the first sentence of its docstring."""
    modules = sorted((p for p in (ROOT / "labkit").rglob("*.py") if "data" not in p.relative_to(ROOT).parts), key=lambda p: (len(p.relative_to(ROOT).parts) > 2, p.as_posix()))
    lines = {p.relative_to(ROOT).as_posix(): first_line(p) for p in modules if p.name != "__init__.py" or p.parent.name == "labkit"}
    lines |= FOLDERS | {name: text for name, text in OTHERS.items() if (ROOT / name).exists()}
    wide = max(map(len, lines))
    return "\n".join(["```", *(f"{name:<{wide}}  {text}" for name, text in lines.items()), "```"])


def first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def test_the_tree_is_that_of_the_checkout():
    before, after = around(README, "tree")
    assert README.read_text(encoding="utf-8") == before + tree() + "\n" + after, "run: python tests/test_readme.py"


def test_every_module_says_what_it_is():
    bare = [str(p) for p in (ROOT / "labkit").rglob("*.py") if not first_line(p)]
    assert not bare


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert targets and not [t for t in targets if not (ROOT / t).exists()]


def test_the_commands_named_exist():
    named = set(re.findall(r"labkit (build|measure|run|doctor|models|test|lab|new|clean|report|house|headline|claims|grade|bundle|serve-dashboard|explain|sweep|serve|deploy|env)\b", README.read_text(encoding="utf-8")))
    said = subprocess.run([sys.executable, "-m", "labkit", "--help"], capture_output=True, text=True, cwd=ROOT).stdout
    assert not [name for name in named if not re.search(rf"^\s+{name}\b", said, re.M)]


def test_ci_runs_what_readme_prints():
    text = README.read_text(encoding="utf-8")
    for step in ("first", "second"):
        script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
        assert f"<!-- command: {step} -->\n```bash\n" in text
        assert "readme_command" in script and "for step in first second" in script


if __name__ == "__main__":
    write_into(README, tree() + "\n", "tree")
