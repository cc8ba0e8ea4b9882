"""Batching: what many requests ask of the model is answered together, by one thread."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Condition, Thread
from typing import Generic, TypeVar

from img2prompt.app.uploads import Full

BATCH = 32  # items at a time
WAITING = 4 * BATCH  # items that may wait
PAUSE = 0.02  # seconds for others to join the first: those who were answered together ask again together

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """One thread that answers items in batches, in the order in which they came.

    Args:
        work: answers at most `batch` items, in their order. Where it fails for several, each is tried alone.
        batch, limit: how many items are answered together, and how many may wait.
    """

    def __init__(
        self, work: Callable[[Sequence[Item]], Sequence[Result]], batch: int = BATCH, limit: int = WAITING
    ) -> None:
        self._work, self._batch, self.limit = work, batch, limit
        self._waiting: deque[tuple[Item, Future[Result]]] = deque()
        self._changed, self._closed = Condition(), False
        self._seconds = 0.0  # of the last batch
        self._thread = Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return len(self._waiting)

    @property
    def seconds(self) -> int:
        """About how long those that wait take, at least 1."""
        return max(1, math.ceil((self.waiting / self._batch + 1) * self._seconds))

    def put(self, items: Sequence[Item]) -> list[Future[Result]]:
        """Let items wait for their answers, all of them or none; one whose future is cancelled is passed over.

        Raises:
            Full: there is no room for all of them, or `close` was called.
        """
        with self._changed:
            if self._closed or len(self._waiting) + len(items) > self.limit:
                raise Full("too many images are waiting")
            futures: list[Future[Result]] = [Future() for _ in items]
            self._waiting.extend(zip(items, futures, strict=True))
            self._changed.notify()
        return futures

    def close(self) -> None:
        """Take nothing more, and return when what waits is answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._changed.wait_for(lambda: len(self._waiting) >= self._batch or self._closed, PAUSE)
                taken = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
            left = [(item, future) for item, future in taken if future.set_running_or_notify_cancel()]
            if left:
                start = time.monotonic()
                self._answer(left)
                self._seconds = time.monotonic() - start
            del taken, left  # or they would be held until the next ones come

    def _answer(self, taken: Sequence[tuple[Item, Future[Result]]]) -> None:
        try:
            found = self._work([item for item, _ in taken])
        except Exception as error:
            if len(taken) > 1:
                for one in taken:
                    self._answer([one])
                return
            traceback.print_exc(file=sys.stderr)
            taken[0][1].set_exception(error)
            return
        for (_, future), result in zip(taken, found, strict=True):
            future.set_result(result)
