"""Metrics of a server for Prometheus. Every engine has its own registry, so that one process can hold several."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters, gauges and histograms, all named ``fp4dit_…``.

    Attributes:
        requests: HTTP requests for images, by status code.
        request_seconds: seconds from the arrival of a request to the last byte of its answer, by status code.
        images: images drawn.
        batch_size: images per batch.
        batch_seconds: seconds of drawing one batch.
        waited: seconds that an image waited in the queue, once per image.
        waiting: images in the queue now.
        ready: 1 once warmed up, else 0.
    """

    def __init__(self) -> None:
        self.registry = to = CollectorRegistry()
        self.requests = Counter("fp4dit_requests", "Requests for images, by status code", ["code"], registry=to)
        self.request_seconds = Histogram(
            "fp4dit_request_seconds", "Whole time of a request for images", ["code"], buckets=_SECONDS, registry=to
        )
        self.images = Counter("fp4dit_images", "Images drawn", registry=to)
        self.batch_size = Histogram(
            "fp4dit_batch_size", "Images drawn together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=to
        )
        self.batch_seconds = Histogram("fp4dit_batch_seconds", "Drawing one batch", buckets=_SECONDS, registry=to)
        self.waited = Histogram("fp4dit_queue_seconds", "An image in the queue", buckets=_SECONDS, registry=to)
        self.waiting = Gauge("fp4dit_queue_depth", "Images in the queue now", registry=to)
        self.ready = Gauge("fp4dit_ready", "Whether the model is warmed up", registry=to)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)
