"""Export of quantized transformers to one file that runs without the model's Python class."""
