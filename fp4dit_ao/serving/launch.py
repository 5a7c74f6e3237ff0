"""Loads a model by name and makes the application that serves it."""

from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI

from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.serving.app import Abilities, Access, Limits, create_app
from fp4dit_ao.serving.drawing import Painter
from fp4dit_ao.serving.engine import Engine
from fp4dit_ao.serving.engine_types import Batching


@dataclass(frozen=True)
class Options:
    """Options of serving a model.

    Attributes:
        name: name in ``/v1/models``; that of the folder if None.
        batching: see :class:`Batching`.
        limits: see :class:`Limits`.
        same_bits: see :class:`Painter`.
        compile: run the transformer under ``torch.compile``.
        device: device of the pipeline; if None the GPU, or the CPU without one.
        weights: form of quantized weights; see :func:`fp4dit_ao.load_pipeline`.
        access: see :class:`Access`.
    """

    name: str | None = None
    batching: Batching = field(default_factory=Batching)
    limits: Limits = field(default_factory=Limits)
    same_bits: bool = False
    compile: bool = True
    device: str | None = None
    weights: str = "packed"
    access: Access = field(default_factory=Access)


def application(model: str, options: Options | None = None) -> tuple[FastAPI, Engine]:
    """Loads ``model`` (see ``named_models.folder_of``); returns its application, and its engine, which is not started
    yet.

    Raises:
        OSError: the model cannot be found or read.
        ValueError: the model is not a text-to-image pipeline, or the options contradict each other.
    """
    options = options or Options()
    pipe = named_models.open_pipeline(model, options.device, compile=options.compile, weights=options.weights)
    if options.compile and not named_models.is_quantized(model):
        pipe.transformer.compile(dynamic=True)
    pipe.set_progress_bar_config(disable=True)
    painter = Painter(pipe, options.batching.max_batch, options.same_bits)
    engine = Engine(painter.draw, painter.warm_up, options.batching)
    painter.between_steps = engine.check
    name = options.name or Path(model).resolve().name
    abilities = Abilities(painter.previews, "image" in painter.edits, "mask" in painter.edits)
    app = create_app(engine, name, painter.default, painter.multiple, options.limits, options.access, abilities)
    return app, engine
