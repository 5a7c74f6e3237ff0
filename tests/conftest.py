"""What all tests share: compiled code is cached between runs only while the package stays as it is."""

import hashlib
from pathlib import Path

import torch.compiler.config

ROOT = Path(__file__).parents[1]


def _sources() -> str:
    """A digest of every source file: torch's caches know our operators by name, not by what they trace to."""
    digest = hashlib.sha256()
    for folder in ("fp4dit_ao", "passes", "observers"):
        for path in sorted(file for suffix in ("*.py", "*.c", "*.h") for file in (ROOT / folder).rglob(suffix)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


torch.compiler.config.cache_key_tag = _sources()
