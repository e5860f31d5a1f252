"""What a server counts and times, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from ..data.extras import require

# Seconds: from a small model's answer on an idle machine to one that nobody waits for.
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
ROWS = tuple(float(2**n) for n in range(15))


class Metrics:
    """Counters and histograms in a registry of their own, so that several servers in a process do not mix.

    Args:
        waiting: how many requests wait for the model.
        inside: how many are in the server, from their head to their answer.
    """

    def __init__(self, waiting: Callable[[], float], inside: Callable[[], float]) -> None:
        client = require("prometheus_client", "counting requests", "serve")
        self._client = client
        self._registry = client.CollectorRegistry()
        registry = {"registry": self._registry}
        self._requests = client.Counter(
            "fastenc_requests", "Requests answered, by path and status.", ["path", "status"], **registry
        )
        self._seconds = client.Histogram(
            "fastenc_request_seconds", "From a request's head to its answer.", ["path"], buckets=SECONDS, **registry
        )
        self._rows = client.Counter("fastenc_rows", "Rows turned into vectors.", **registry)
        self._batch_rows = client.Histogram(
            "fastenc_batch_rows", "Rows in a call of the model.", buckets=ROWS, **registry
        )
        self._model_seconds = client.Histogram(
            "fastenc_model_seconds", "Seconds of a call of the model.", buckets=SECONDS, **registry
        )
        for name, what, count in (
            ("fastenc_queue_requests", "Requests that wait for the model.", waiting),
            ("fastenc_inside_requests", "Requests to encode, from their head to their answer.", inside),
        ):
            client.Gauge(name, what, **registry).set_function(count)

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def encoded(self, rows: int, seconds: float) -> None:
        self._rows.inc(rows)
        self._batch_rows.observe(rows)
        self._model_seconds.observe(seconds)

    @property
    def content_type(self) -> str:
        return self._client.CONTENT_TYPE_LATEST

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return self._client.generate_latest(self._registry)
