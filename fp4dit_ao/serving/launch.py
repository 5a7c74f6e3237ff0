"""From a model's name to an application that serves it."""

from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI

from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.serving.app import Limits, create_app
from fp4dit_ao.serving.drawing import Painter
from fp4dit_ao.serving.engine import Batching, Engine


@dataclass(frozen=True)
class Options:
    """How a model is served.

    Attributes:
        name: in ``/v1/models``; that of the folder if None.
        batching: see :class:`Batching`.
        limits: see :class:`Limits`.
        same_bits: see :class:`Painter`.
        compile: run the transformer under ``torch.compile``.
        device: where; the GPU if there is one if None.
        weights: memory or speed; see :func:`fp4dit_ao.load_pipeline`.
    """

    name: str | None = None
    batching: Batching = field(default_factory=Batching)
    limits: Limits = field(default_factory=Limits)
    same_bits: bool = False
    compile: bool = True
    device: str | None = None
    weights: str = "packed"


def application(model: str, options: Options | None = None) -> tuple[FastAPI, Engine]:
    """Load ``model`` (see ``models.folder_of``) behind an engine, which is not started yet, and the application before it.

    Raises:
        OSError: it cannot be found or read.
        ValueError: it is no text-to-image pipeline, or the options contradict each other.
    """
    options = options or Options()
    pipe = named_models.open_pipeline(model, options.device, compile=options.compile, weights=options.weights)
    if options.compile and not named_models.is_quantized(model):
        pipe.transformer.compile(dynamic=True)
    pipe.set_progress_bar_config(disable=True)
    painter = Painter(pipe, options.batching.max_batch, options.same_bits)
    engine = Engine(painter.draw, painter.warm_up, options.batching)
    name = options.name or Path(model).resolve().name
    return create_app(engine, name, painter.default, painter.multiple, options.limits), engine
