"""Text from ids that arrive one by one: no half characters, no half stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from labkit.checkpoint import Checkpoint

HALF = "\N{REPLACEMENT CHARACTER}"  # what decoding shows for bytes that are not (yet) a character


class TextStream:
    """Ids in, text out; the pieces joined are the decoded whole, cut before the first stop string.

    A token may hold one byte of a character that takes up to four, and some tokenizers drop a space at the start of what they
    decode. So a few ids already shown are decoded again with the new ones, and the difference is what is new.
    """

    def __init__(self, checkpoint: Checkpoint, stop: Sequence[str] = ()):
        self._checkpoint, self._stop = checkpoint, tuple(stop)
        self._ids: list[int] = []
        self._base = self._shown = 0  # ids[base:shown] were shown already and are decoded again as the left neighbour
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain now; "" while a character or a stop string may be incomplete."""
        self._ids.append(token)
        before, after = self._decode(self._base, self._shown), self._decode(self._base, len(self._ids))
        if len(after) <= len(before) or after.endswith(HALF):
            return ""
        self._base, self._shown = self._shown, len(self._ids)
        return self._until_stop(after[len(before) :])

    def finish(self) -> str:
        """What was held back, given out because nothing follows."""
        before, after = self._decode(self._base, self._shown), self._decode(self._base, len(self._ids))
        self._base = self._shown = len(self._ids)
        rest = self._until_stop(after[len(before) :])
        held, self._held = self._held, ""
        return rest + ("" if self.stopped else held)

    def _decode(self, first: int, last: int) -> str:
        return self._checkpoint.decode(self._ids[first:last], special=False)

    def _until_stop(self, new: str) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        places = [place for word in self._stop if (place := text.find(word)) >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        keep = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` that begins `word`."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
