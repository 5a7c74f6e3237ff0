"""Options of ``fp4dit-ao quantize``."""

from pathlib import Path
from typing import Annotated

import typer

from fp4dit_ao.cli.call_options import call_options
from fp4dit_ao.cli.config_options import config_fields, layer_rules
from fp4dit_ao.cli.options import Call, Device, Dtype, Prompts, Steps

Iterations = Annotated[
    int | None, typer.Option(min=1, help="Iterations of learned rounding per block, layer or window.")
]


def quantize(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or 'reference'.")],
    out: Annotated[Path, typer.Option(help="Folder of the quantized pipeline; must be new or empty.")],
    recipe: Annotated[
        str,
        typer.Option(help="w4a6_codebook, w4a6, w4a8, …; 'best' or 'best_5bit_10min' with methods, too; see README."),
    ] = "w4a6_codebook",
    prompts: Prompts = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            help="'gptq' (if not given) takes minutes, 'nearest' seconds; 'adaround' learns it, as it is if --iters, "
            "--objective, --scope or the like are given; see docs/methods.md."
        ),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="What learned rounding minimises: 'mse', if not given, or 'layer_weighted', ….")
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(help="What is rounded together: 'block', if not given, 'layer', 'window' or 'model'."),
    ] = None,
    iters: Iterations = None,
    transform: Annotated[
        list[str] | None,
        typer.Option(
            help="Graph transform before quantization, such as smoothquant or low_rank:rank=8; repeatable, in order."
        ),
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
    compile_rounding: Annotated[
        bool,
        typer.Option(
            "--compile-rounding",
            help="Learn rounding under torch.compile: half a minute for each kind of block, then in two thirds of the time.",
        ),
    ] = False,
    bfloat16: Annotated[
        bool | None,
        typer.Option(help="Multiply in bfloat16 while rounding is learned; on GPUs that have it if not given."),
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
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory that a process may take, such as 8GB: what does not fit beside the block at work goes into files "
            "beside OUT; the result's bits are the same."
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
        compile_rounding,
        bfloat16,
        search_combination,
    )
    run.quantize(
        model, out, recipe=recipe, prompts=prompts, methods=methods, skip=skip or [], call=call_options(call, steps),
        samples=samples, seed=seed, resume=resume, device=device, dtype=dtype,
        fields=config_fields(config, group_size, weight_search), layers=layer_rules(layer),
        encoded_prompts=encoded_prompts, components=component, text_encoder_recipe=text_encoder_recipe,
        memory=memory,
    )  # fmt: skip
