"""From a model and a sample to one aten graph. Empty, so that exported files load without torchao and diffusers."""
