"""Options of the command ``fp4dit-ao``. Each command imports its module when called, so that ``--help`` is quick."""

import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from fp4dit_ao import __version__
from fp4dit_ao.cli.call_options import call_options
from fp4dit_ao.cli.config_options import config_fields, layer_rules
from fp4dit_ao.cli.one_sentence import OneSentence
from fp4dit_ao.cli.output_paths import check_writable_file, check_writable_folder

app = typer.Typer(
    cls=OneSentence, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="4-bit floating-point diffusion transformers. MODEL is a pipeline's folder, a hub id, or 'reference' for the "
    "small pipeline that ships. --debug, anywhere, shows the traceback of an error.",
)  # fmt: skip


USAGE_ERROR: Any = typer.BadParameter.__base__
"""Exception of wrong options: click's, or that of the copy that newer versions of typer bring along."""


def print_version(asked: bool) -> None:
    """Prints the versions of this package and of what it runs on, and exits, if ``asked``."""
    if asked:
        found = {name: metadata.version(name) for name in ("torch", "torchao", "diffusers")}
        typer.echo(f"fp4dit-ao {__version__} ({', '.join(f'{name} {text}' for name, text in found.items())})")
        raise typer.Exit


Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; the GPU if there is one.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; the pipeline's own number if not given.")]
Prompts = Annotated[Path | None, typer.Option(help="Text file, one prompt a line; may be left out for 'reference'.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Type of what is not quantized: 'float32', 'bfloat16', 'float16', or 'stored', as in MODEL's files."
    ),
]
Call = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=VALUE of the pipeline's call, such as height=512, guidance_scale=3 or negative_prompt=blurry; repeatable."
    ),
]
Compile = Annotated[bool, typer.Option(help="Run the quantized model under torch.compile.")]
Weights = Annotated[
    str,
    typer.Option(
        help="Form of a quantized MODEL's weights: 'packed'; one byte each as 'int8' or 'fp8': twice the memory, faster; "
        "'auto': bfloat16 where that is faster here, in a model that runs in bfloat16."
    ),
]
Iterations = Annotated[
    int | None, typer.Option(min=1, help="Iterations of learned rounding per block, layer or window.")
]


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture, the table and the quantized pipeline.")] = Path(
        "outputs/demo"
    ),
    rounding: Annotated[
        str, typer.Option(help="'gptq', or learned, such as 'scale_aware', the paper's; see docs/methods.md.")
    ] = "gptq",
    iters: Annotated[
        int, typer.Option(min=1, help="Iterations of learned rounding per block (the paper: 2500).")
    ] = 100,
    seed: Annotated[int, typer.Option(help="Seed of calibration and images.")] = 0,
    compile: Compile = True,
) -> None:
    """Quantize the reference pipeline to W4A6, and compare it with the original and with naive INT4/INT6."""
    from fp4dit_ao.cli import demo as run

    check_writable_folder(out)
    run.demo(out, rounding, iters, seed, compile)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or 'reference'.")],
    out: Annotated[Path, typer.Option(help="Folder of the quantized pipeline; must be new or empty.")],
    recipe: Annotated[str, typer.Option(help="w4a6_codebook, w4a6, w4a8, …; see README.")] = "w4a6_codebook",
    prompts: Prompts = None,
    rounding: Annotated[
        str, typer.Option(help="'adaround' learns it; 'gptq' takes minutes, 'nearest' seconds; see docs/methods.md.")
    ] = "adaround",
    objective: Annotated[str, typer.Option(help="What learned rounding minimises, such as 'layer_weighted'.")] = "mse",
    scope: Annotated[
        str, typer.Option(help="What is rounded together: 'block', 'layer', 'window' or 'model'.")
    ] = "block",
    iters: Iterations = None,
    transform: Annotated[
        list[str] | None,
        typer.Option(help="Graph transform before quantization, such as smoothquant; repeatable, in order."),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Glob of modules to leave in high precision; repeatable.")
    ] = None,
    steps: Steps = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Calibration samples: transformer calls of real generations.")
    ] = 128,
    selection: Annotated[
        str, typer.Option(help="Which calls become samples: 'uniform' over timesteps, or 'density_diversity'.")
    ] = "uniform",
    seed: Annotated[int, typer.Option(help="Seed of the calibration noise.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was killed.")] = False,
    device: Device = None,
    allocation: Annotated[
        str, typer.Option(help="How layers choose among a recipe's candidate formats, such as 'integer_programme'.")
    ] = "least_error",
    budget_bits: Annotated[
        float | None, typer.Option(help="Mean of stored bits per weight that the allocation may spend.")
    ] = None,
    fine_tuning: Annotated[
        str | None, typer.Option(help="Fine-tuning after rounding, such as 'scales' or 'efficientdm'.")
    ] = None,
    fine_tuning_steps: Annotated[int | None, typer.Option(min=1, help="Optimisation steps of fine-tuning.")] = None,
    call: Call = None,
    dtype: Dtype = "stored",
    config: Annotated[
        Path | None,
        typer.Option(
            help='JSON object of fields of QuantConfig that replace the recipe\'s, such as {"group_size": 64}.'
        ),
    ] = None,
    group_size: Annotated[int | None, typer.Option(min=2, help="Inputs that share a weight scale.")] = None,
    weight_search: Annotated[
        str | None, typer.Option(help="How weight scales are found, such as 'mse'; the recipe's if not given.")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="GLOB=RECIPE for some modules, or GLOB=none to leave them, such as 'blocks.0.*=none'; repeatable."
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="End a unit's learned rounding early, where so many iterations bring less than 1 %."),
    ] = None,
    encoded_prompts: Annotated[
        Path | None,
        typer.Option(
            help="Safetensors file of encoded prompts, tensors named as the pipeline's arguments (prompt_embeds, …), in place "
            "of --prompts: the text encoder is never loaded."
        ),
    ] = None,
    component: Annotated[
        list[str] | None,
        typer.Option(
            help="What to quantize: transformers, and text encoders beside them (text_encoder); repeatable. All transformers "
            "if not given."
        ),
    ] = None,
    text_encoder_recipe: Annotated[
        str | None, typer.Option(help="Recipe of text encoders, such as w4a8; if not given, 4-bit weights alone.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Calibration rows per iteration (16).")] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Parts of the calibration data, one or more per process of torchrun; they decide the result's bits.",
        ),
    ] = None,
    search_combination: Annotated[
        bool,
        typer.Option(
            "--search-combination",
            help="Try equalization, SmoothQuant, GPTQ and --rounding, and bias correction in turn; keep what errs less on "
            "held-out samples. Six models are quantized.",
        ),
    ] = False,
) -> None:
    """Quantize MODEL and save it. `fp4dit-ao methods` lists the names that options for methods take."""
    from fp4dit_ao.cli import quantize as run

    methods = run.Methods(
        rounding,
        objective,
        scope,
        iters,
        selection,
        tuple(transform or ()),
        allocation,
        budget_bits,
        fine_tuning,
        patience,
        fine_tuning_steps,
        batch_size,
        shards,
        search_combination,
    )
    run.quantize(
        model, out, recipe=recipe, prompts=prompts, methods=methods, skip=skip or [], call=call_options(call, steps),
        samples=samples, seed=seed, resume=resume, device=device, dtype=dtype,
        fields=config_fields(config, group_size, weight_search), layers=layer_rules(layer),
        encoded_prompts=encoded_prompts, components=component, text_encoder_recipe=text_encoder_recipe,
    )  # fmt: skip


@app.command()
def sweep(
    table: Annotated[
        Path,
        typer.Argument(
            help='JSON list of rows: {"name": …, "model": …} and options of quantize; those of evaluate under "evaluate".'
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results, which every machine sees; finished rows are kept.")],
    cpus: Annotated[float, typer.Option(min=0, help="CPUs of each row.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each row; rows with fractions share one.")] = 0,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, such as 'auto'; a local one is started if not given.")
    ] = None,
) -> None:
    """Quantize, and evaluate, a list of models and recipes over a Ray cluster."""
    from fp4dit_ao.cli import sweep as run

    check_writable_folder(out)
    run.sweep(table, out, cpus=cpus, gpus=gpus, address=address, check=check_command, run=run_command)


def check_command(arguments: list[str]) -> None:
    """Raises ``ValueError`` if ``fp4dit-ao`` does not take these arguments."""
    commands: Any = typer.main.get_command(app)
    try:
        commands.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    except USAGE_ERROR as error:
        raise ValueError(error.format_message()) from error


def run_command(arguments: list[str]) -> int:
    """Runs ``fp4dit-ao`` in this process, and returns its exit status."""
    return int(app(args=arguments, standalone_mode=False) or 0)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A quantized pipeline's folder, or any MODEL.")],
    prompt: Annotated[list[str], typer.Option(help="Prompt to draw; repeatable.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("generated.png"),
    compare: Annotated[str | None, typer.Option(help="MODEL that draws the same, in another column.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; the same for both models.")] = 0,
    steps: Steps = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated together.")] = 4,
    compile: Compile = False,
    device: Device = None,
    weights: Weights = "packed",
    call: Call = None,
    dtype: Dtype = "stored",
) -> None:
    """Draw prompts into one picture, with --compare beside another model's images of the same seeds."""
    check_writable_file(out)
    arguments = call_options(call, steps)
    from fp4dit_ao.cli import generate as run

    run.generate(model, prompt, out, compare, seed, arguments, batch_size, compile, device, weights, dtype)


@app.command()
def evaluate(
    model: Annotated[
        list[str], typer.Argument(help="A quantized pipeline's folder, or any MODEL; several are compared.")
    ],
    against: Annotated[str, typer.Option(help="MODEL that it was made from.")],
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line, or a file of --prompt-set.")] = None,
    prompt_set: Annotated[
        str, typer.Option(help="How the file is read: lines, coco, mjhq, drawbench, parti, hpsv2.")
    ] = "lines",
    count: Annotated[
        int, typer.Option(min=2, help="Prompts to use: the first of the file, or spread over the reference's.")
    ] = 100,
    sample: Annotated[str, typer.Option(help="'first', or 'shuffled' as deepcompressor samples its 5000.")] = "first",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per prompt: 0, 1, …")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    seeding: Annotated[
        str,
        typer.Option(help="Noise: 'distinct' for every image, 'same' for all of a seed, 'name' from a prompt's name."),
    ] = "distinct",
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Also judge by NAME or NAME=WEIGHTS (folder, file, hub id); `methods metric` lists. Repeatable."
        ),
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Folder of real images, for metrics of whole sets.")] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Draw the original again: 'batch' size, 'compiled', attention 'kernel'; or 'none'. Repeatable."
        ),
    ] = None,
    steps: Steps = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated together.")] = 16,
    out: Annotated[Path, typer.Option(help="JSON to write; page and images go beside it.")] = Path("evaluation.json"),
    images: Annotated[Path | None, typer.Option(help="Folder where images are kept, for other runs too.")] = None,
    report: Annotated[bool, typer.Option(help="Write an HTML page with the worst images.")] = True,
    shown: Annotated[int, typer.Option(min=1, help="Images of each model on that page.")] = 24,
    compile: Compile = False,
    device: Device = None,
    devices: Annotated[str | None, typer.Option(help="Share images out, such as cuda:0,cuda:1.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="Only draw part K of N, as K/N from 0; for several machines.")
    ] = None,
    call: Call = None,
    dtype: Dtype = "stored",
) -> None:
    """Print a Markdown table of how close MODEL's images are to those of the model that it was made from.

    Images are kept: a run that is interrupted goes on, and another metric needs no new ones.
    """
    check_writable_file(out)
    arguments = call_options(call, steps)
    if device is not None and devices is not None:
        raise ValueError("give --device or --devices, not both")
    from fp4dit_ao.cli import evaluate as run

    run.evaluate(
        model, against,
        run.WantedImages(prompts, prompt_set, count, sample, tuple(range(first_seed, first_seed + seeds)), seeding, arguments),
        run.Procedure(
            batch_size, compile, tuple(devices.split(",")) if devices else (device,), run.shard_of(shard), dtype,
            () if baseline == ["none"] else tuple(baseline or ["batch"]), tuple(metric or ()), real,
        ),
        run.OutputFiles(
            out, out.with_suffix(".html") if report else None, images or out.with_name(f"{out.stem}_images"), shown
        ),
    )  # fmt: skip


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A quantized pipeline's folder.")],
    against: Annotated[
        str | None, typer.Option(help="MODEL that it was made from: adds the error of each weight.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of the levels that the weights use.")] = None,
    device: Device = None,
    measure: Annotated[
        bool, typer.Option(help="Measure every layer against bfloat16 on this machine: some seconds, once.")
    ] = True,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Image tokens of a call, all images together; those of calibration if not given."),
    ] = None,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="Measure anew what an earlier run has measured and kept.")
    ] = False,
) -> None:
    """Print format, unit, bytes, speed on this machine and error of each layer of MODEL; what stayed in high precision; why."""
    if picture is not None:
        check_writable_file(picture)
    from fp4dit_ao.cli import inspect as run

    run.inspect(model, against, picture, device, run.Measuring(tokens, measure_again) if measure else None)


@app.command()
def methods(
    point: Annotated[
        str | None, typer.Argument(help="Plug-in point, such as rounding; all of them if not given.")
    ] = None,
) -> None:
    """List the methods that are registered at every plug-in point, with source and cost."""
    from fp4dit_ao import plugin_points as run

    typer.echo(run.methods_table(run.methods(point)))


@app.command()
def benchmark(
    model: Annotated[str, typer.Argument(help="A float pipeline to generate with: folder, hub id, or 'reference'.")] = (
        "reference"
    ),
    part: Annotated[
        list[str] | None,
        typer.Option(help="'linears', 'attention', 'transformer' or 'generation'; repeatable. All if not given."),
    ] = None,
    recipe: Annotated[
        list[str],
        typer.Option(help="Recipes to measure, with nearest rounding; repeatable. Bars are judged on the first."),
    ] = ["w4a6_codebook", "w4a6", "w4a8", "w4a8_int8"],  # noqa: B006
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Packages to compare with, such as 'SDNQ int8', or 'none'; repeatable. All if not given."),
    ] = None,
    linear: Annotated[
        list[str] | None,
        typer.Option(help="Weights and tokens, such as flux:256,1024 or 4608x1152:16+peers (out x in); repeatable."),
    ] = None,
    transformer: Annotated[
        list[str] | None,
        typer.Option(help="Pixels and layers of PixArt-XL's width, such as 512x28, or 512x2+peers; repeatable."),
    ] = None,
    size: Annotated[
        str,
        typer.Option(help="Default cases: 'quick' (minutes), 'standard' (40 minutes on two cores) or 'full' (longer)."),
    ] = "standard",
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated together.")] = 4,
    steps: Steps = None,
    prompts: Prompts = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every variant for each linear.")] = 5,
    model_rounds: Annotated[int, typer.Option(min=1, help="Turns of every variant for steps and generations.")] = 3,
    at_once: Annotated[
        int, typer.Option(min=3, help="Variants in memory together; speed ratios are taken among them.")
    ] = 8,
    out: Annotated[Path, typer.Option(help="JSON to write; the Markdown goes beside it.")] = Path("benchmark.json"),
    device: Device = None,
) -> None:
    """Time linears, one denoising step and whole generations, compared with float models and other packages, in turns.

    Prints one Markdown report: bars and whether they are met, speed ratios, errors, weight bytes, peak memory, cold
    compile times; at its end one sentence, how much faster and smaller the quantized model is here. OMP_NUM_THREADS sets
    the threads.
    """
    check_writable_file(out)
    from fp4dit_ao.cli import benchmark as run

    run.benchmark(
        model, parts=part or [], recipes=recipe, peers=peer or [], linear=linear or [], transformer=transformer or [],
        size=size, batch_size=batch_size, steps=steps, prompts=prompts, rounds=rounds, model_rounds=model_rounds,
        at_once=at_once, device=device, out=out,
    )  # fmt: skip


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A quantized pipeline's folder, or its transformer's.")],
    out: Annotated[
        Path, typer.Argument(help="File to write: .pt2 runs, .safetensors holds codes and scales for other tools.")
    ],
    aoti: Annotated[bool, typer.Option("--aoti", help="Compile it ahead of time (AOTInductor).")] = False,
    device: Device = None,
) -> None:
    """Write MODEL's transformer as one file: a torch.export archive, compiled code, or codes and scales alone."""
    from fp4dit_ao.cli import export as run

    check_writable_file(out)
    run.export(model, out, aoti, device)


@app.command()
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


def main() -> None:
    """Entry point of ``fp4dit-ao``."""
    sys.exit(app())
