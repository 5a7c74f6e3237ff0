"""Serving images: an engine that batches what arrives together, an HTTP app that speaks the OpenAI images API, and Ray Serve.

``engine`` and ``drawing`` know nothing of HTTP; ``app`` puts a FastAPI application before an engine, ``ray`` makes many
replicas of both.
"""
