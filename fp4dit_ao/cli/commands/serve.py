"""Options of ``fp4dit-ao serve``."""

from typing import Annotated

import typer

from fp4dit_ao.cli.options import Compile, Device, Weights


def serve(
    model: Annotated[str, typer.Argument(help="A quantized pipeline's folder, or any MODEL.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name in /v1/models; the folder's if not given.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most images drawn together.")] = 8,
    window: Annotated[float, typer.Option(min=0, help="Milliseconds to wait for images to draw together.")] = 20,
    max_queue: Annotated[int, typer.Option(min=1, help="Images that may wait; more are answered with 429.")] = 64,
    max_n: Annotated[int, typer.Option(min=1, help="Images of one request.")] = 4,
    max_prompt: Annotated[int, typer.Option(min=1, help="Characters of a prompt.")] = 2000,
    max_side: Annotated[
        int | None,
        typer.Option(min=8, help="Pixels of an image's width and height; twice the model's own if not given."),
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a request.")] = 100,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until a request is answered with 504.")] = 120,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that accepted requests have to end in after Ctrl-C or SIGTERM.")
    ] = 30,
    same_bits: Annotated[
        bool, typer.Option("--same-bits", help="Fill batches up, so that equal requests give equal bits; slower.")
    ] = False,
    compile: Compile = True,
    device: Device = None,
    weights: Weights = "packed",
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FP4DIT_API_KEY", help="Key that requests must bring; the variable keeps it out of process lists."
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may ask from a browser, or '*'; repeatable.")
    ] = None,
) -> None:
    """Serve MODEL over HTTP, as the OpenAI images API does: POST /v1/images/generations."""
    from fp4dit_ao.cli import serve as run

    run.serve(
        model, host, port, name, {"max_batch": max_batch, "window": window / 1000, "max_queue": max_queue},
        {"n": max_n, "prompt": max_prompt, "side": max_side, "steps": max_steps, "timeout": timeout,
         "shutdown": shutdown_timeout},
        same_bits, compile, device, weights, api_key, cors_origin or [],
    )  # fmt: skip
