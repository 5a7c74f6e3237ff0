"""What has nothing to do with quantization."""
