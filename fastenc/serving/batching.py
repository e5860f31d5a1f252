"""Batcher: what several requests ask for at the same time in one call, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class FullError(Exception):
    """There are as many requests in the server as may be."""


class ClosedError(Exception):
    """The server is about to stop and takes no more requests."""


@dataclass(frozen=True, eq=False)
class _Job:
    rows: Any
    count: int
    answer: Future[Any]


class Batcher:
    """Joins the rows of requests into calls of one function.

    A call takes what is there, up to `batch_rows`. It waits for more only while other requests are in the server, and
    no longer than `wait_s` after the first of its own came: a single client never waits. Where a call fails that was
    for several requests, each of them is tried alone, so that one does not spoil the others.

    Args:
        encode: what some requests send -> what each of them gets, called in one thread only.
        batch_rows: the most rows in a call; a request of more has a call of its own.
        wait_s: seconds.
        queue: requests that may be in the server at once.
        observe: called after each call with its rows and its seconds.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        batch_rows: int,
        wait_s: float,
        queue: int,
        observe: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self._encode, self._observe = encode, observe
        self._batch_rows, self._wait_s, self._queue = batch_rows, wait_s, queue
        self._change = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._entered = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="fastenc-batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait for a call."""
        return len(self._jobs)

    @property
    def entered(self) -> int:
        """How many requests are in the server."""
        return self._entered

    @property
    def closed(self) -> bool:
        return self._closed

    @contextmanager
    def enter(self) -> Iterator[None]:
        """A request is in the server: from its head to its answer.

        Raises:
            FullError, ClosedError: it must not come in.
        """
        with self._change:
            if self._closed:
                raise ClosedError
            if self._entered >= self._queue:
                raise FullError
            self._entered += 1
        try:
            yield
        finally:
            with self._change:
                self._entered -= 1
                self._change.notify()

    def submit(self, rows: Any, count: int) -> Future[Any]:
        """What `encode` gives for these rows, `count` of them, when it is there.

        Raises:
            ClosedError: `close` was called.
        """
        job = _Job(rows, count, Future())
        with self._change:
            if self._closed:
                raise ClosedError
            self._jobs.append(job)
            self._change.notify()
        return job.answer

    def close(self) -> None:
        """Answer what was submitted, and end the thread."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._take():
            jobs = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            if jobs:
                self._answer(jobs)

    def _take(self) -> list[_Job]:
        """The jobs of the next call; none when all is done."""
        with self._change:
            while not self._jobs:
                if self._closed:
                    return []
                self._change.wait()
            deadline = time.monotonic() + self._wait_s
            while not self._closed and self._entered > len(self._jobs):
                left = deadline - time.monotonic()
                if left <= 0 or sum(job.count for job in self._jobs) >= self._batch_rows:
                    break
                self._change.wait(left)
            jobs = [self._jobs.popleft()]
            rows = jobs[0].count
            while self._jobs and rows + self._jobs[0].count <= self._batch_rows:
                jobs.append(self._jobs.popleft())
                rows += jobs[-1].count
            return jobs

    def _answer(self, jobs: Sequence[_Job]) -> None:
        start = time.perf_counter()
        try:
            vectors = self._encode([job.rows for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
                return
            for job in jobs:
                self._answer([job])
            return
        self._observe(sum(job.count for job in jobs), time.perf_counter() - start)
        for job, each in zip(jobs, vectors, strict=True):
            job.answer.set_result(each)
