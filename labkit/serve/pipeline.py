"""A batch through a model service: a bounded queue, a journal, and a restart that neither loses nor repeats an item.

    report = run(items, http_ask("http://127.0.0.1:8000", "edgehome"), "answers.jsonl")

The journal is the result: one line an item, appended when its answer is there. A run that was killed leaves at most one torn
line, which the next run cuts off; items that have a line are not asked again. The reader of `items` waits while the queue is
full, so a slow model slows the reader instead of filling memory.

    python -m labkit.serve.pipeline ITEMS.jsonl ANSWERS.jsonl --url URL --model NAME
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from labkit._files import Busy, locked
from labkit.types import LabkitError

_END = object()


class Later(Exception):
    """The service is busy or away: ask again after `seconds`."""

    def __init__(self, seconds: float = 0.1):
        super().__init__(f"again in {seconds:g} s")
        self.seconds = seconds


@dataclass(frozen=True)
class Report:
    """What one run did. `waited` is how long the reader stood before a full queue; `deepest` how full the queue ever was."""

    done: int = 0
    failed: int = 0  # of the done ones, those whose line holds an error
    skipped: int = 0  # had a line already
    deepest: int = 0
    waited: float = 0.0  # seconds
    seconds: float = 0.0


def run(
    items: Iterable[dict[str, Any]],
    ask: Callable[[str], Any],
    journal: Path | str,
    *,
    workers: int = 2,
    depth: int = 8,
    tries: int = 6,
) -> Report:
    """Ask for every item ({"id": …, "text": …}) that has no line in the journal yet; `workers` ask at once.

    `ask` gives the answer to a text; it raises Later where the service is busy (asked up to `tries` times, waiting twice as
    long each time), and LabkitError for a text that will never have one: that is written as an error, so nothing is lost.
    Any other error of `ask` or `items` ends the run; what was journalled stays. LabkitError when another run holds the journal.
    """
    journal, began = Path(journal), time.monotonic()
    try:
        with locked(journal.with_name(journal.name + ".lock"), wait=False):
            done = {line["id"] for line in recover(journal)}
            with journal.open("ab") as sink:
                batch = _Batch(ask, sink, queue.Queue(depth), done, tries)
                counts = batch.through(items, workers)
            return Report(**counts, seconds=time.monotonic() - began)
    except Busy:
        raise LabkitError(f"Another run writes {journal}; wait for its end, or give a journal of its own.") from None


def recover(journal: Path) -> list[dict[str, Any]]:
    """The lines of a journal; a last one that was torn when its writer was killed is cut off the file."""
    text = journal.read_bytes() if journal.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with journal.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise LabkitError(f"{journal} has a line that is no JSON; it is no journal of ours, give another name.") from None


class _Batch:
    def __init__(self, ask: Callable[[str], Any], sink: Any, waiting: queue.Queue, done: set[Any], tries: int):
        self.ask, self.sink, self.waiting, self.done, self.tries = ask, sink, waiting, done, tries
        self.counts: dict[str, Any] = {"done": 0, "failed": 0, "skipped": 0, "deepest": 0, "waited": 0.0}
        self.writing = threading.Lock()
        self.stopped = threading.Event()
        self.problem: BaseException | None = None

    def through(self, items: Iterable[dict[str, Any]], workers: int) -> dict[str, Any]:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for item in self._new(items):
                self._put(item)
        except Exception as error:  # of the items: what was read already is still answered
            self.problem = self.problem or error
        except BaseException as error:  # Ctrl-C: stop now
            self._fail(error)
        for _ in threads:
            self._put(_END)
        for thread in threads:
            thread.join()
        if self.problem:
            raise self.problem
        return self.counts

    def _new(self, items: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for item in items:
            if self.stopped.is_set():
                return
            if item["id"] in self.done:
                self.counts["skipped"] += 1
            else:
                self.done.add(item["id"])  # an id that comes twice is one item
                yield item

    def _put(self, item: Any) -> None:
        began = time.monotonic()
        while True:
            try:
                self.waiting.put(item, timeout=0.2)
                break
            except queue.Full:
                if self.stopped.is_set() and item is not _END:
                    return
        self.counts["waited"] += time.monotonic() - began
        self.counts["deepest"] = max(self.counts["deepest"], self.waiting.qsize())

    def _work(self) -> None:
        while (item := self.waiting.get()) is not _END:
            if self.stopped.is_set():
                continue  # empty the queue, so that the reader can end
            try:
                self._write(self._answered(item))
            except BaseException as error:
                self._fail(error)

    def _answered(self, item: dict[str, Any]) -> dict[str, Any]:
        for left in range(self.tries - 1, -1, -1):
            try:
                return {"id": item["id"], "answer": self.ask(item["text"])}
            except Later as later:
                if not left:
                    return {"id": item["id"], "error": f"The service was busy {self.tries} times; run this batch again later."}
                time.sleep(later.seconds * 2 ** (self.tries - 1 - left))
            except LabkitError as error:
                return {"id": item["id"], "error": str(error)}
        raise LabkitError(f"tries={self.tries} was given; expected 1 or more.")

    def _write(self, line: dict[str, Any]) -> None:
        with self.writing:
            self.sink.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self.sink.flush()
            os.fsync(self.sink.fileno())  # done is what a power cut leaves
            self.counts["done"] += 1
            self.counts["failed"] += "error" in line

    def _fail(self, error: BaseException) -> None:
        self.problem = self.problem or error
        self.stopped.set()


def http_ask(url: str, model: str, *, key: str | None = None, seconds: float = 60.0, new_tokens: int = 128) -> Callable[[str], str]:
    """`ask` for a service that speaks OpenAI's chat language: greedy, so that asking twice gives the same answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def ask(text: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": new_tokens}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        try:
            with opener.open(request, timeout=seconds) as reply:
                return json.load(reply)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            if error.code in (429, 503):
                raise Later(_seconds(error.headers.get("Retry-After"))) from None
            raise LabkitError(f"{url} answered {error.code}: {error.read(300).decode(errors='replace')}") from None
        except OSError:  # nobody listens: it may be starting
            raise Later(0.2) from None

    return ask


def _seconds(told: str | None) -> float:
    try:
        return min(30.0, max(0.05, float(told or 0.1)))
    except ValueError:  # Retry-After may also be a date
        return 1.0


def read_items(path: Path | str) -> Iterator[dict[str, Any]]:
    """Items of a JSON Lines file, one at a time: the file may be larger than memory."""
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                item = json.loads(line)
                yield {"id": item["id"], "text": item["text"]}
            except (ValueError, KeyError, TypeError):
                raise LabkitError(f'Line {number} of {path} is no item; expected {{"id": …, "text": …}}.') from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m labkit.serve.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("items", type=Path)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--depth", type=int, default=8)
    chosen = parser.parse_args(arguments)
    try:
        ask = http_ask(chosen.url, chosen.model)
        report = run(read_items(chosen.items), ask, chosen.journal, workers=chosen.workers, depth=chosen.depth)
    except LabkitError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(asdict(report)))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
