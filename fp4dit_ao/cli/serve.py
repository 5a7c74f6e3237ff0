"""``fp4dit-ao serve``: serves a pipeline with the OpenAI images API."""

import contextlib
import logging
import signal
import socket
from collections.abc import Sequence
from typing import Any

from fp4dit_ao.cli.compilation import compile_if_possible
from fp4dit_ao.diffusers_integration import named_models


def serve(
    model: str, host: str, port: int, name: str | None, batching: dict[str, Any], limits: dict[str, Any], same_bits: bool,
    compile: bool, device: str | None, weights: str, api_key: str | None, origins: Sequence[str],
) -> None:  # fmt: skip
    """Loads ``model``, listens, warms up, and answers until interrupted.

    Accepted requests then have ``limits["shutdown"]`` seconds.

    Raises:
        OSError: there is no such model, or the port is taken.
        ValueError: see ``named_models.weights_of``.
        RuntimeError: FastAPI or uvicorn is not installed, or the model failed to warm up.
    """
    try:
        import uvicorn

        from fp4dit_ao.serving.app import Access, Limits
        from fp4dit_ao.serving.engine_types import Batching
        from fp4dit_ao.serving.launch import Options, application
    except ImportError as error:
        raise RuntimeError(f"serving needs {error.name}; install it with: pip install 'fp4dit-ao[serve]'") from error

    if api_key is not None and not api_key.strip():
        raise ValueError("the API key is empty; give a long random text, or leave it out")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    named_models.weights_of(model, weights)
    options = Options(
        name,
        Batching(**batching),
        Limits(**limits),
        same_bits,
        compile_if_possible(compile, device or named_models.default_device()),
        device,
        weights,
        Access(api_key, tuple(origins)),
    )
    listening = _reserve(host, port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    print(f"loading {model}", flush=True)
    app, engine = application(model, options)
    address = f"http://{host}:{listening.getsockname()[1]}"
    listening.listen()  # from here on connections are answered
    print(f"listening on {address}; warming up, see {address}/health/ready", flush=True)
    config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=max(1, round(options.limits.shutdown)))
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn finishes accepted requests, then raises the interrupt again
        uvicorn.Server(config).run(sockets=[listening])
    if engine.failure is not None:
        raise RuntimeError(f"the model failed to warm up: {engine.failure}")


def _reserve(host: str, port: int) -> socket.socket:
    """Binds the port, before minutes are spent on loading a model."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except OSError as error:
        opened.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port") from error
    return opened
