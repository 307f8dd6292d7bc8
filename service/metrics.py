"""Prometheus metrics of a replica, and of the jobs in the bucket."""

from collections import Counter as Count

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.jobs import PAUSED, QUEUED, RUNNING, VALIDATING
from service.layout import active_jobs, jobs_of
from utils.storage.s3 import S3Store

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The metrics of one replica."""

    def __init__(self, store: S3Store):
        self._store = store
        self._registry = CollectorRegistry()
        labels = ("method", "route")
        self._latency = Histogram(
            "anneal_request_seconds",
            "Duration of requests.",
            labels,
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._requests = Counter(
            "anneal_requests", "Requests by status.", (*labels, "status"), registry=self._registry
        )
        self._jobs = Gauge("anneal_jobs", "Unfinished jobs by status.", ("status",), registry=self._registry)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._latency.labels(method, route).observe(seconds)
        self._requests.labels(method, route, str(status)).inc()

    def text(self) -> bytes:
        """Return the metrics in Prometheus' format; reads the unfinished jobs from the bucket."""
        found = Count(
            job["status"]
            for project, ids in active_jobs(self._store).items()
            for job in jobs_of(self._store, project).get_many(ids).values()
        )
        for status in (VALIDATING, QUEUED, RUNNING, PAUSED):
            self._jobs.labels(status).set(found[status])
        return generate_latest(self._registry)
