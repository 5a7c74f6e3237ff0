"""Pictures that answers name by a URL: a bounded store in memory."""

import collections
import secrets
import threading

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
"""Media types by output format."""


class Pictures:
    """The latest pictures, under names that cannot be guessed.

    Args:
        limit: most bytes of all pictures together; the oldest go first.
    """

    def __init__(self, limit: int = 64 << 20):
        self.limit = limit
        self._kept: collections.OrderedDict[str, tuple[bytes, str]] = collections.OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def add(self, data: bytes, output_format: str) -> str:
        """Keeps a picture file; returns its name."""
        name = f"{secrets.token_urlsafe(16)}.{output_format}"
        with self._lock:
            self._kept[name] = data, MEDIA_TYPES[output_format]
            self._size += len(data)
            while self._size > self.limit and len(self._kept) > 1:
                _, (oldest, _) = self._kept.popitem(last=False)
                self._size -= len(oldest)
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """A picture file and its media type; None if it is not kept any more."""
        with self._lock:
            return self._kept.get(name)
