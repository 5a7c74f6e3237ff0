"""Graph passes: each takes a ``GraphModule`` and gives a ``GraphModule``. Import them from ``fp4dit_ao.passes``."""
