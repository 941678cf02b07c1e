"""The counts in the formats that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from mlxproxy.controller.state import Snapshot
from mlxproxy.observability.metrics import Counts, Histogram


def render(counts: Counts, state: Snapshot, memory: int, accept: str) -> tuple[bytes, str]:
    """All metrics as text, and its content type.

    Args:
        counts: what has happened.
        state: what is now, as the controller describes it.
        memory: the backend's, in bytes.
        accept: the Accept header of whoever asks.
    """
    registry = CollectorRegistry()  # our own: the library's global one has metrics we do not mean
    registry.register(_Now(counts, state, memory))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Now(Collector):
    """One scrape."""

    def __init__(self, counts: Counts, state: Snapshot, memory: int) -> None:
        self._counts = counts
        self._state = state
        self._memory = memory

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        requests = CounterMetricFamily(
            "mlxproxy_requests", "Requests by route and status", labels=("path", "status")
        )
        for (path, status), number in sorted(counts.requests.items()):
            requests.add_metric((path, str(status)), number)
        yield requests
        yield CounterMetricFamily(
            "mlxproxy_tokens_in", "Prompt tokens, where known", counts.tokens_in
        )
        yield CounterMetricFamily(
            "mlxproxy_cached_tokens",
            "Prompt tokens taken from the backend's prompt cache, where known",
            counts.cached_tokens,
        )
        yield CounterMetricFamily("mlxproxy_tokens_out", "Generated tokens", counts.tokens_out)
        yield _histogram(
            "mlxproxy_first_token_seconds",
            "Time from a request to its first token, including time in the queue",
            counts.first_token,
        )
        yield _histogram(
            "mlxproxy_tokens_per_second", "Generation speed of each answer", counts.speed
        )
        yield GaugeMetricFamily("mlxproxy_in_flight", "Answers in flight", self._state.in_flight)
        yield GaugeMetricFamily("mlxproxy_waiting", "Queued requests", self._state.waiting)
        yield _histogram(
            "mlxproxy_load_seconds", "Time from a backend's start until it is ready", counts.loads
        )
        yield _histogram(
            "mlxproxy_swap_seconds",
            "Time without answers while one model replaced another, including draining",
            counts.swaps,
        )
        yield CounterMetricFamily("mlxproxy_deaths", "Backend crashes", counts.deaths)
        yield GaugeMetricFamily(
            "mlxproxy_backend_memory_bytes",
            "The backend's resident memory (on macOS, without Metal allocations)",
            self._memory,
        )


def _histogram(name: str, meaning: str, histogram: Histogram) -> HistogramMetricFamily:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(name, meaning, buckets, histogram.sum)
