"""Serving of images: an engine that batches requests, an HTTP application with the OpenAI images API, and Ray Serve.

``engine`` and ``drawing`` do not depend on HTTP; ``app`` is the FastAPI application of an engine, ``ray`` runs many
replicas of both.
"""
