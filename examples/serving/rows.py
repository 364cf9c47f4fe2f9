"""The rows of a rank's batch: which request is in which, what each brings to the next step, what it got from the last.

A request reads its prompt in pieces of `chunk` tokens and then goes on token by token. The two happen in steps of
different width, in turn while some rows need one and some the other: a token is then always computed by the same
program from the same pieces, whatever else the rank does, and comes out the same bit by bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from serving.program import Batch


@dataclasses.dataclass(frozen=True)
class Request:
    """What a rank is to generate.

    Attributes:
      id: unique in the front end's life.
      prompt: token ids, at least one.
      max_tokens: at least 1; ends with reason "length".
      temperature, top_p, seed: see `Batch`.
      ignore_eos: go on after a token that ends a sequence.
    """

    id: int
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False


class Token(NamedTuple):
    """A generated token: the `index`-th of its request; `finish` if it is the last."""

    request: int
    index: int
    token: int
    finish: Literal["", "stop", "length"]


@dataclasses.dataclass
class _Row:
    request: Request
    read: int = 0  # tokens of prompt and answer that are in the cache
    answer: list[int] = dataclasses.field(default_factory=list)


class Rows:
    """Not thread-safe: belongs to the thread that steps."""

    def __init__(self, count: int, chunk: int, eos_ids: Iterable[int]):
        self._rows: list[_Row | None] = [None] * count
        self._chunk, self._eos_ids = chunk, frozenset(eos_ids)
        self._width = 1  # of the last step

    def __len__(self) -> int:
        """Requests in work."""
        return sum(row is not None for row in self._rows)

    def add(self, request: Request) -> None:
        """The front end gives a rank no more requests than it has rows."""
        self._rows[self._rows.index(None)] = _Row(request)

    def cancel(self, request: int) -> None:
        """Frees the row; nothing happens if the request is over."""
        self._rows = [None if row and row.request.id == request else row for row in self._rows]

    def next_batch(self) -> Batch:
        """What the next step is to read; the same again until `accept`."""
        prefill = any(self._reads_prompt(row) for row in self._rows if row)
        decode = any(not self._reads_prompt(row) for row in self._rows if row)
        width = self._chunk if prefill and (self._width == 1 or not decode) else 1
        batch = Batch.empty(len(self._rows), width)
        for b, row in enumerate(self._rows):
            if row:
                batch.start[b] = row.read  # also of rows that take no part: their caches stay as they are up to there
        for b, row in self._taking_part(width):
            request = row.request
            tokens = request.prompt[row.read : row.read + width] or row.answer[-1:]
            batch.tokens[b, : len(tokens)], batch.lengths[b] = tokens, len(tokens)
            batch.temperature[b], batch.top_p[b], batch.seeds[b] = request.temperature, request.top_p, request.seed
        return batch

    def accept(self, batch: Batch, tokens: np.ndarray) -> list[Token]:
        """`tokens` [B] came out of `batch`, which `next_batch` gave last; returns those that belong to answers."""
        self._width, made = batch.tokens.shape[1], []
        for b, row in self._taking_part(self._width):
            row.read += int(batch.lengths[b])
            if row.read < len(row.request.prompt):
                continue
            token = int(tokens[b])
            row.answer.append(token)
            finish: Literal["", "stop", "length"] = ""
            if token in self._eos_ids and not row.request.ignore_eos:
                finish = "stop"
            elif len(row.answer) == row.request.max_tokens:
                finish = "length"
            made.append(Token(row.request.id, len(row.answer) - 1, token, finish))
            if finish:
                self._rows[b] = None
        return made

    def _reads_prompt(self, row: _Row) -> bool:
        return row.read < len(row.request.prompt)

    def _taking_part(self, width: int) -> Iterator[tuple[int, _Row]]:
        for b, row in enumerate(self._rows):
            if row and self._reads_prompt(row) == (width > 1):
                yield b, row
