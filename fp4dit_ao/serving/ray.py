"""Replicas of one application on Ray Serve: ``serve run fp4dit_ao.serving.ray:build model=DIR replicas=4``."""

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from fp4dit_ao.diffusers_integration.pipeline_folder import Weights
from fp4dit_ao.serving.engine_types import Batching
from fp4dit_ao.serving.launch import Options, application


class Arguments(BaseModel):
    """Arguments that ``serve run`` takes as ``name=value``.

    Attributes:
        model: a pipeline's folder, the same on every machine, or a hub id.
        replicas: number of processes, each with its own model, queue and batches.
        cpus: CPUs per replica.
        gpus: GPUs per replica; replicas with fractions share one.
        max_batch: most images drawn together.
        window: milliseconds that the oldest image waits for others.
        max_queue: most waiting images per replica.
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
    """Makes the Ray Serve application: Ray spreads requests over the replicas that are warmed up."""
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
