"""The operator library ``torch.ops.fp4dit_ao``."""

import torch

from fp4dit_ao import __version__

torch.compiler.config.cache_key_tag = f"{torch.compiler.config.cache_key_tag} fp4dit_ao {__version__}".strip()
"""Compiled graphs hold what the composites were when they were traced, and are kept on disk under the operators' names."""

LIBRARY = torch.library.Library("fp4dit_ao", "DEF")
