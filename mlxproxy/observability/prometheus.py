"""Exposition of the counts in the formats that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

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

LABELS = ("model",)


def render(
    counts: Counts,
    state: Snapshot,
    memory: Mapping[int, int],
    accept: str,
    peers: Sequence[Mapping[str, Any]] = (),
) -> tuple[bytes, str]:
    """Return all metrics as text, and its content type.

    Args:
        counts: the counts since the start.
        state: the current state, as the controller describes it.
        memory: bytes that the backend of each slot holds.
        accept: the Accept header of the request.
        peers: each peer's `name`, whether it is `reachable`, and its answers `in_flight`.
    """
    registry = CollectorRegistry()  # not the library's global one, which has unrelated metrics
    registry.register(_Now(counts, state, memory, peers))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Now(Collector):
    """One scrape."""

    def __init__(
        self,
        counts: Counts,
        state: Snapshot,
        memory: Mapping[int, int],
        peers: Sequence[Mapping[str, Any]],
    ) -> None:
        self._peers = peers
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
        yield _counter("mlxproxy_tokens_in", "Prompt tokens, where known", counts.tokens_in)
        yield _counter(
            "mlxproxy_cached_tokens",
            "Prompt tokens taken from the backend's prompt cache, where known",
            counts.cached_tokens,
        )
        yield _counter("mlxproxy_tokens_out", "Generated tokens", counts.tokens_out)
        yield _histogram(
            "mlxproxy_first_token_seconds",
            "Time from a request to its first token, including time in the queue",
            counts.first_token,
        )
        yield _histogram(
            "mlxproxy_tokens_per_second", "Generation speed of each answer", counts.speed
        )
        yield self._gauge(
            "mlxproxy_in_flight",
            "Answers in flight",
            {slot.id: slot.in_flight for slot in self._state.slots},
        )
        yield GaugeMetricFamily("mlxproxy_waiting", "Queued requests", self._state.waiting)
        yield _histogram(
            "mlxproxy_load_seconds", "Time from a backend's start until it is ready", counts.loads
        )
        yield _histogram(
            "mlxproxy_swap_seconds",
            "Time without answers while this model replaced another, including draining",
            counts.swaps,
        )
        yield _counter("mlxproxy_deaths", "Backend crashes", counts.deaths)
        yield self._gauge(
            "mlxproxy_backend_memory_bytes",
            "Memory that the backend holds (on macOS its footprint, Metal included)",
            self._memory,
        )
        if self._peers:
            yield self._of_peers("mlxproxy_peer_up", "Whether the peer answers", "reachable")
            yield self._of_peers(
                "mlxproxy_peer_in_flight", "Answers in flight from the peer", "in_flight"
            )

    def _of_peers(self, name: str, meaning: str, field: str) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, meaning, labels=("peer",))
        for peer in self._peers:
            gauge.add_metric((peer["name"],), peer[field])
        return gauge

    def _gauge(self, name: str, meaning: str, values: Mapping[int, float]) -> GaugeMetricFamily:
        """Return a gauge with a value for each loaded model, from the values of the slots."""
        gauge = GaugeMetricFamily(name, meaning, labels=LABELS)
        for slot in self._state.slots:
            if slot.spec is not None:
                gauge.add_metric((slot.spec.model_id,), values.get(slot.id, 0))
        return gauge


def _counter(name: str, meaning: str, values: Mapping[str, int]) -> CounterMetricFamily:
    counter = CounterMetricFamily(name, meaning, labels=LABELS)
    for model, value in sorted(values.items()):
        counter.add_metric((model,), value)
    return counter


def _histogram(
    name: str, meaning: str, histograms: Mapping[str, Histogram]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, meaning, labels=LABELS)
    for model, histogram in sorted(histograms.items()):
        bounds = [*map(str, histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family.add_metric((model,), buckets, histogram.sum)
    return family
