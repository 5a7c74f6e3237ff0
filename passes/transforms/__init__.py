"""Graph transforms: what changes a captured graph before it is quantized."""
