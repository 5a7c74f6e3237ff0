"""Names the transformers of the installed diffusers that nothing tries, for CI: ``python -m benchmarks.small_transformers``."""

import diffusers

from benchmarks.small_transformers import transformer_classes, untried_classes

untried = ", ".join(untried_classes()) or "none"
print(f"diffusers {diffusers.__version__}: {len(transformer_classes())} transformers; untried: {untried}")
