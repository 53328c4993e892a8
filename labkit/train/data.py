"""Conversations from JSON Lines, Hugging Face data sets or the house language; bad lines are refused by file and line.

A line is {"messages": [{"role", "content"}, ...]} with the answer last, or {"prompt": text, "completion": text}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.types import LabkitError

LONGEST = 1_000_000  # bytes of a line: a whole file without line ends is a mistake, not an example
ROLES = ("system", "user", "assistant")
# What other templates write around their turns. In a message it means that the text was rendered already.
MARKERS = re.compile(
    r"<\|im_(?:start|end)\|>|<\|(?:end|user|assistant|system|eot_id|begin_of_text|start_header_id|endoftext)\|>|"
    r"\[/?INST\]|<<SYS>>|<(?:start|end)_of_turn>|^### (?:Instruction|Response):",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Example:
    """One conversation ending in the answer to learn. `source` says where it came from: "train.jsonl, line 12"."""

    messages: tuple[Mapping[str, str], ...]
    source: str
    kind: str = ""  # what it is an example of, for stratified splits; the line's "kind", or the intent of a house task

    @property
    def asked(self) -> str:
        """Everything but the last answer: what a split must keep together."""
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages[:-1])

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def to_json(self) -> str:
        """The line `read_jsonl` reads back as this example."""
        kind = {"kind": self.kind} if self.kind else {}
        return json.dumps({"messages": [dict(m) for m in self.messages], **kind}, ensure_ascii=False)


def read_jsonl(path: str | Path, longest: int = LONGEST) -> list[Example]:
    """The examples of a UTF-8 JSON Lines file. LabkitError, naming file and line, at the first line that is not one."""
    path = Path(path)
    if not path.is_file():
        raise LabkitError(f"{path} is not a file; expected JSON Lines with one conversation a line.")
    found = [example(_parse(raw, where), where) for where, raw in _lines(path, longest)]
    if not found:
        raise LabkitError(f"{path}, line 1: the file is empty; expected one conversation a line.")
    return found


def write_jsonl(examples: Iterable[Example], path: str | Path) -> Path:
    """Write examples one a line, UTF-8."""
    Path(path).write_text("".join(e.to_json() + "\n" for e in examples), encoding="utf-8")
    return Path(path)


def from_rows(rows: Iterable[Mapping[str, Any]], name: str) -> list[Example]:
    """Examples of a Hugging Face data set (`datasets.load_dataset`, `Dataset.from_list`) or any list of dicts."""
    found = [example(dict(row), f"{name}, row {i}") for i, row in enumerate(rows, 1)]
    if not found:
        raise LabkitError(f"{name}, row 1: the data set is empty; expected one conversation a row.")
    return found


def house(split: str = "train", n: int = 1000, seed: int = 0, intents: list[str] | None = None) -> list[Example]:
    """`n` conversations of the house language. split: "train" or "heldout" (slots never seen in training)."""
    from labkit.house.tasks import tasks

    drawn = tasks(split, n, seed, intents)
    return [Example(tuple(t.conversation()), f"house {split} {seed}, task {i}", t.intent) for i, t in enumerate(drawn, 1)]


def vacuum(split: str = "train", n: int = 1000, seed: int = 0) -> list[Example]:
    """The same of the intent the shipped model has not met, the robot vacuum (`labkit.house.vacuum`)."""
    from labkit.house.vacuum import tasks

    return [
        Example(tuple(t.conversation()), f"vacuum {split} {seed}, task {i}", t.intent)
        for i, t in enumerate(tasks(split, n, seed), 1)
    ]


def example(row: Mapping[str, Any], where: str) -> Example:
    """One row as an Example; LabkitError beginning with `where` when it is not a conversation with an answer."""
    messages = row.get("messages")
    if messages is None and {"prompt", "completion"} <= row.keys():
        messages = [*_turns(row["prompt"], "user"), *_turns(row["completion"], "assistant")]
    if not isinstance(messages, list) or not messages:
        keys = ", ".join(sorted(map(str, row))) or "nothing"
        raise LabkitError(f"{where}: found {keys}; expected messages, or prompt and completion.")
    for message, before in zip(messages, [None, *messages[:-1]], strict=True):
        _check_message(message, before and before["role"], where)
    if messages[-1]["role"] != "assistant":
        raise LabkitError(f"{where}: the last message is the {messages[-1]['role']}'s; expected the assistant's answer.")
    kept = tuple({"role": m["role"], "content": m["content"]} for m in messages)
    return Example(kept, where, str(row.get("kind") or ""))


def _turns(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _check_message(message: Any, before: str | None, where: str) -> None:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    if role not in ROLES:
        raise LabkitError(f"{where}: a message has the role {role!r}; expected one of {', '.join(ROLES)}.")
    if not isinstance(content, str) or not content.strip():
        raise LabkitError(f"{where}: the {role}'s message is empty or no text; expected what was said.")
    follows = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user",)}[role]
    if before not in follows:
        raise LabkitError(
            f"{where}: {role} comes after {before or 'nothing'}; expected system first, then user and assistant in turn."
        )
    if mark := MARKERS.search(content):
        raise LabkitError(
            f"{where}: the {role}'s message contains {mark[0]!r}, a template's marker; give what was said alone, "
            "the checkpoint's own template is put around it."
        )


def _lines(path: Path, longest: int) -> Iterator[tuple[str, bytes]]:
    """("file, line n", bytes) of every line, read at most `longest` bytes at a time."""
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(longest + 1), b""), 1):
            where = f"{path}, line {number}"
            if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
                name = "UTF-8 with a byte order mark" if raw[0] == 0xEF else "UTF-16"
                raise LabkitError(f"{where}: the file is {name}; expected plain UTF-8: save it again as that.")
            if len(raw) > longest:
                raise LabkitError(f"{where}: longer than {longest:,} bytes; expected one conversation a line.")
            if not raw.strip():
                raise LabkitError(f"{where}: the line is empty; expected one conversation: delete the line.")
            yield where, raw


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LabkitError(
            f"{where}: byte {error.start + 1} is not UTF-8 ({raw[error.start : error.start + 1]!r}); save the file as UTF-8."
        ) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise LabkitError(f"{where}: not JSON ({error}); expected one object a line.") from None
    if not isinstance(row, dict):
        raise LabkitError(f"{where}: found a {type(row).__name__}; expected a JSON object.")
    return row
