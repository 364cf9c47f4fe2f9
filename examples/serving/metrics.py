"""Figures for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.router import Router, Stream

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """What the server counts; `text` has it in Prometheus' format."""

    MEDIA_TYPE = CONTENT_TYPE_LATEST

    def __init__(self, router: Router):
        self._registry = registry = CollectorRegistry()

        def gauge(name: str, what: str, value: Any) -> None:
            Gauge(f"nixlep_serving_{name}", what, registry=registry).set_function(value)

        gauge("ranks", "Members of the group", lambda: len(router.members))
        gauge("epoch", "Number of the membership", lambda: router.epoch)
        gauge("requests_running", "Requests in the rows of ranks", lambda: router.running)
        gauge("requests_waiting", "Requests without a row", lambda: router.waiting)
        gauge("recompiles", "Programs that ranks compiled after their start", lambda: router.recompiles)
        gauge("blocked_seconds", "Longest wait of a rank in the last resize", lambda: _last_blocked_s(router))
        self._tokens = Counter("nixlep_serving_tokens", "Tokens generated", registry=registry)
        self._lost = Counter("nixlep_serving_ranks_lost", "Ranks that ended unasked", registry=registry)
        self._restarts = Counter("nixlep_serving_restarts", "Requests that another rank began anew", registry=registry)
        self._requests = Counter("nixlep_serving_requests", "Requests by HTTP status", ["status"], registry=registry)
        first, gap = "From a request to its first token", "Between two tokens of a request"
        self._first = Histogram("nixlep_serving_first_token_seconds", first, registry=registry, buckets=_SECONDS)
        self._gap = Histogram("nixlep_serving_token_gap_seconds", gap, registry=registry, buckets=_SECONDS)
        router.on_event.append(self._on_event)

    def _on_event(self, event: str, **details: Any) -> None:
        if event == "tokens":
            self._tokens.inc(details["new"])
        elif event == "ended":
            self._restarts.inc(details["requests"])
            self._lost.inc(not details["expected"])

    def finished(self, stream: Stream) -> None:
        """A request is over."""
        if stream.times:
            self._first.observe(stream.times[0] - stream.submitted)
        for before, after in zip(stream.times, stream.times[1:], strict=False):
            self._gap.observe(after - before)

    def answered(self, status: int) -> None:
        """An HTTP request for generation was answered."""
        self._requests.labels(str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _last_blocked_s(router: Router) -> float:
    blocked_ms = router.blocked_ms()
    return blocked_ms[max(blocked_ms)] / 1e3 if blocked_ms else 0.0
