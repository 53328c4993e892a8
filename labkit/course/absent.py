"""Labs where an engine is absent: a cell that needs it says so in one sentence, and the lab goes on with what is there."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from shutil import which
from typing import Any

from labkit.i18n import tr
from labkit.types import NotInstalled

PACKAGES = ("torch", "fastapi", "cryptography")  # without these, cells of some labs cannot run
SHOW, EXCUSED = "_labkit_show", "_labkit_excused"  # names the changed cells call


def go_on_without(programs: Sequence[str] = ()) -> None:
    """In a kernel that lacks an engine, one of PACKAGES or of `programs`, let cells that need it be skipped; elsewhere cells stay as written."""
    from IPython import get_ipython

    from labkit import engines

    shell = get_ipython()
    there = None not in engines.available().values() and all(map(find_spec, PACKAGES)) and all(map(which, programs))
    if shell is None or there:
        return
    kept = [one for one in shell.ast_transformers if not isinstance(one, Skipper)]
    skipper = Skipper(shell.user_ns)
    shell.ast_transformers[:] = [*kept, skipper]
    shell.user_ns |= {SHOW: skipper.show, EXCUSED: skipper.excused}


class Skipper:
    """Puts each cell into a `try` that excuses what an absent package explains, and nothing else."""

    def __init__(self, space: dict[str, Any]) -> None:
        self.space = space  # the notebook's variables
        self.lost: set[str] = set()  # names that skipped cells would have set
        self.names: set[str] = set()  # those of the cell that runs

    def visit(self, cell: ast.Module) -> ast.Module:
        """The cell with its last expression still shown, its errors looked at by `excused`."""
        self.names = set(_assigned(cell))
        if not cell.body:
            return cell
        body = list(cell.body)
        if isinstance(body[-1], ast.Expr):
            body[-1] = ast.Expr(_call(SHOW, body[-1].value))
        again = ast.If(ast.UnaryOp(ast.Not(), _call(EXCUSED, ast.Name("_labkit_error", ast.Load()))), [ast.Raise()], [])
        caught = ast.ExceptHandler(ast.Name("Exception", ast.Load()), "_labkit_error", [again])
        cell.body = [ast.Try(body, [caught], [], [])]
        return ast.fix_missing_locations(cell)

    def show(self, value: Any) -> None:
        if value is not None:
            from IPython.display import display

            display(value)

    def excused(self, error: Exception) -> bool:
        """Say why the cell was skipped; False when no absent package explains its error."""
        said = next((text for one in _chain(error) if (text := self._explained(one))), None)
        if said is None:
            return False
        self.lost |= self.names
        for name in self.names:  # half of what the cell would have made is worse than none of it
            self.space.pop(name, None)
        print(tr("Skipped: {reason}", reason=said))
        return True

    def _explained(self, error: BaseException) -> str | None:
        if isinstance(error, NotInstalled):
            return str(error)
        if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("labkit"):
            return tr("{package} is not installed here.", package=error.name.split(".")[0])
        if isinstance(error, NameError) and error.name in self.lost:
            return tr("{name} comes from a cell that was skipped.", name=error.name)
        return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _assigned(node: ast.AST) -> Iterator[str]:
    """Names a cell sets: by assignment, import, definition; not those within functions and comprehensions."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((one.asname or one.name).split(".")[0] for one in node.names)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif not isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        for child in ast.iter_child_nodes(node):
            yield from _assigned(child)


def _call(name: str, argument: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), [argument], [])
