"""Many replicas of one application on Ray Serve: ``serve run fp4dit_ao.serving.ray:build model=DIR replicas=4``."""

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from fp4dit_ao.diffusers_integration.pipeline_folder import Weights
from fp4dit_ao.serving.engine import Batching
from fp4dit_ao.serving.launch import Options, application


class Arguments(BaseModel):
    """What ``serve run`` takes as ``name=value``.

    Attributes:
        model: a pipeline's folder, the same on every machine, or a hub id.
        replicas: each a process with its own model, queue and batches.
        cpus: of one replica.
        gpus: of one replica; fractions share one.
        max_batch: images drawn together.
        window: milliseconds to wait for images to draw together.
        max_queue: images that may wait in one replica.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    replicas: int = Field(2, ge=1)
    cpus: float = 1
    gpus: float = 0
    name: str | None = None
    max_batch: int = 8
    window: float = 20
    max_queue: int = 64
    same_bits: bool = False
    compile: bool = True
    device: str | None = None
    weights: Weights = "packed"


def build(args: Arguments) -> serve.Application:
    """The Ray Serve application: a replica takes requests once it is warmed up, and Ray spreads them."""
    batching = Batching(args.max_batch, args.window / 1000, args.max_queue)
    options = Options(
        args.name, batching, same_bits=args.same_bits, compile=args.compile, device=args.device, weights=args.weights
    )
    model = args.model

    def replica() -> FastAPI:
        app, engine = application(model, options)
        engine.start().wait_until_ready()
        return app

    deployment = serve.deployment(
        serve.ingress(replica)(), name="fp4dit", num_replicas=args.replicas, max_ongoing_requests=args.max_queue,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
    )  # fmt: skip
    return deployment.bind()
