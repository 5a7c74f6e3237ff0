"""Operator library ``torch.ops.fp4dit_ao``."""

import torch

from fp4dit_ao import __version__

torch.compiler.config.cache_key_tag = f"{torch.compiler.config.cache_key_tag} fp4dit_ao {__version__}".strip()
"""Version tag of torch.compile's disk cache: its keys hold operators' names only, so that code compiled with other
definitions of them would be found."""

LIBRARY = torch.library.Library("fp4dit_ao", "DEF")
