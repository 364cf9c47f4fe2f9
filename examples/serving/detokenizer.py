"""Tokens to text as they come."""

from __future__ import annotations

from collections.abc import Sequence

from serving.model import Model

_INCOMPLETE = "\ufffd"  # how a tokenizer shows bytes that are no character yet


class Detokenizer:
    """The text of one answer, up to the first of `stops`.

    Attributes:
      stopped: one of `stops` came; there is no more text.
    """

    def __init__(self, model: Model, stops: Sequence[str] = ()):
        self._model, self._stops = model, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._first, self._shown = 0, 0  # ids from _first on are decoded; up to _shown they are in the text already
        self._held = ""  # text that may be the beginning of a stop
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` adds. Some may be held back until it is certain."""
        self._ids.append(token)
        return self._new(final=False)

    def finish(self) -> str:
        """The rest."""
        return "" if self.stopped else self._new(final=True)

    def _new(self, *, final: bool) -> str:
        # Some tokenizers write a token differently behind others: decode it with those shown last.
        before = self._model.decode(self._ids[self._first : self._shown])
        after = self._model.decode(self._ids[self._first :])
        if len(after) > len(before) and (final or not after.endswith(_INCOMPLETE)):
            self._held += after[len(before) :]
            self._first, self._shown = self._shown, len(self._ids)
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
