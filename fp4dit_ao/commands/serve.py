"""``fp4dit-ao serve``: a pipeline behind the OpenAI images API."""

import logging
import socket
from pathlib import Path
from typing import Any

from fp4dit_ao import models


def serve(
    model: str, host: str, port: int, name: str | None, batching: dict[str, Any], limits: dict[str, Any], compile: bool,
    device: str | None,
) -> None:  # fmt: skip
    """Load ``model``, listen, warm up, and answer until interrupted; what was accepted by then is finished.

    Raises:
        ImportError: FastAPI or uvicorn is not installed.
        OSError: no such model, or the port is taken.
        RuntimeError: the model failed to warm up.
    """
    try:
        import uvicorn

        from fp4dit_ao.serving.app import Limits, create_app
        from fp4dit_ao.serving.drawing import Painter
        from fp4dit_ao.serving.engine import Batching, Engine
    except ImportError as error:
        raise RuntimeError(f"serving needs {error.name}; install it with: pip install 'fp4dit-ao[serve]'") from error

    models.folder_of(model)
    known = Batching(**batching)
    listening = _listen(host, port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    print(f"loading {model}", flush=True)
    pipe = models.open_pipeline(model, device, compile=compile)
    pipe.set_progress_bar_config(disable=True)
    painter = Painter(pipe, known.max_batch)
    engine = Engine(painter.draw, painter.warm_up, known)
    bounds = Limits(**limits)
    app = create_app(engine, name or Path(model).resolve().name, painter.default, painter.multiple, bounds)
    address = f"http://{host}:{listening.getsockname()[1]}"
    print(f"listening on {address}; warming up, see {address}/health/ready", flush=True)
    config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=int(bounds.timeout) + 1)
    uvicorn.Server(config).run(sockets=[listening])
    if engine.failure is not None:
        raise RuntimeError(f"the model failed to warm up: {engine.failure}")


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before minutes go into loading a model."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except OSError as error:
        opened.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port") from error
    return opened
