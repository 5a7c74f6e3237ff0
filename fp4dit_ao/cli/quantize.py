"""``fp4dit-ao quantize``: quantizes a float pipeline and saves it."""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fp4dit_ao.calibration import SELECTIONS, read_encoded_prompts, read_prompts
from fp4dit_ao.cli.output_paths import check_writable_folder
from fp4dit_ao.config import PLANS, Fields, QuantConfig
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer
from fp4dit_ao.diffusers_integration.pipeline_quantization import needs_data, quantize_pipeline
from fp4dit_ao.graph_capture.transforming import resolve_transforms
from fp4dit_ao.passes.fine_tuning import FINE_TUNINGS, FineTuneConfig
from fp4dit_ao.passes.mixed_precision import ALLOCATIONS, measures
from fp4dit_ao.passes.reconstruction import ROUNDINGS
from fp4dit_ao.passes.reconstruction.choice import chosen_config
from fp4dit_ao.passes.reconstruction.rounding import ClosedFormRounding
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.byte_sizes import byte_count
from fp4dit_ao.util.locks import only_process
from fp4dit_ao.util.world import joined

CALIBRATION_PROMPTS = 64
"""Number of the reference pipeline's own prompts that are used if the user gives none."""


PROMPT = "a red fox in the snow"
"""Prompt of the command that is proposed next, if the user's are not at hand."""


@dataclass(frozen=True)
class Methods:
    """Names of the methods that a model is quantized with, as ``quantize_pipeline`` takes them.

    Attributes:
        rounding: None for a plan's, or for what :func:`chosen_config` takes where none is named.
        iters: iterations of learned rounding per unit; None for the default.
        patience: iterations without progress after which a unit ends early; None for never.
        fine_tuning_steps: optimisation steps of fine-tuning; None for the default.
        batch_size: calibration rows per iteration; None for the default.
        shards: parts of the calibration data; None for as many as there are processes.
        compile_rounding: whether rounding is learned under ``torch.compile``.
        bfloat16: whether products are in bfloat16 while rounding is learned; None for GPUs that have it.
        search_combination: find the best combination of methods by measurement.
    """

    rounding: str | None = None
    objective: str | None = None
    scope: str | None = None
    iters: int | None = None
    selection: str = "uniform"
    transforms: Sequence[str] = ()
    allocation: str = "least_error"
    budget_bits: float | None = None
    fine_tuning: str | None = None
    patience: int | None = None
    fine_tuning_steps: int | None = None
    batch_size: int | None = None
    shards: int | None = None
    compile_rounding: bool = False
    bfloat16: bool | None = None
    search_combination: bool = False

    @property
    def learned_options(self) -> list[str]:
        """Options that were given and are of learned rounding alone."""
        names = ("iters", "patience", "compile_rounding", "bfloat16")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) not in (None, False)]

    def with_plan(self, recipe: str) -> tuple[str, "Methods"]:
        """The recipe, and these methods; of a plan its own.

        Raises:
            ValueError: a plan, and methods beside it.
        """
        if recipe not in PLANS:
            learns = self.learned_options or self.search_combination
            return recipe, replace(self, rounding=self.rounding or ("adaround" if learns else None))
        plan = PLANS[recipe]
        plan.check_alone(recipe, {
            "--rounding": self.rounding, "--objective": self.objective, "--scope": self.scope, "--iters": self.iters,
            "--transform": self.transforms, "--fine-tuning": self.fine_tuning, "--patience": self.patience,
            "--search-combination": self.search_combination,
        })  # fmt: skip
        return plan.recipe, replace(
            self, rounding=plan.rounding, transforms=plan.transforms, fine_tuning=plan.fine_tuning
        )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``quantize_pipeline``.

        Raises:
            ValueError: the name of a method is unknown, or an option is given of what has none.
        """
        SELECTIONS.find(self.selection)
        ALLOCATIONS.find(self.allocation)
        if self.fine_tuning is not None:
            FINE_TUNINGS.find(self.fine_tuning)
        elif self.fine_tuning_steps is not None:
            raise ValueError("--fine-tuning-steps is the length of fine-tuning; name a method with --fine-tuning")
        resolve_transforms(self.transforms)
        rounded = chosen_config(self.rounding, self.objective, self.scope)
        if self.learned_options and isinstance(ROUNDINGS.find(rounded.rounding), ClosedFormRounding):
            options = " and ".join(self.learned_options)
            raise ValueError(f"{options} is for learned rounding; leave it out with --rounding {self.rounding}")
        iters = rounded.iters if self.iters is None else self.iters
        rounded = replace(
            rounded, iters=iters, patience=self.patience, shards=self.shards, compile=self.compile_rounding,
            bfloat16=self.bfloat16,
        )  # fmt: skip
        if self.batch_size is not None:
            rounded = replace(rounded, batch_size=self.batch_size)
        tune = FineTuneConfig() if self.fine_tuning_steps is None else FineTuneConfig(steps=self.fine_tuning_steps)
        return {
            "reconstruction": rounded, "selection": self.selection, "transforms": self.transforms,
            "allocation": self.allocation, "budget_bits": self.budget_bits, "fine_tuning": self.fine_tuning, "fine_tune": tune,
            "search_combination": self.search_combination,
        }  # fmt: skip


def quantize(
    model: str, out: Path, *, recipe: str, prompts: Path | None, methods: Methods, skip: Sequence[str],
    call: Mapping[str, Any], samples: int, seed: int, resume: bool, device: str | None,
    dtype: str, fields: Fields, layers: Mapping[str, str | None], encoded_prompts: Path | None = None,
    components: Sequence[str] | None = None, text_encoder_recipe: str | None = None, memory: str | None = None,
) -> None:  # fmt: skip
    """Quantizes ``model`` and saves it to ``out``; a killed run leaves ``<out>.unfinished``, from which ``resume``
    continues. Processes that ``torchrun`` started share the work, and the first one writes.

    Raises:
        ValueError, OSError: wrong input; as much of it as possible is checked before the model is loaded.
    """
    if memory is not None:
        byte_count(memory)
    recipe, methods = methods.with_plan(recipe)
    # the table of families decides what recipes mean for the model
    named = [QuantConfig.from_name(name) for name in (recipe, *layers.values()) if name is not None]
    configs = [config.with_fields(fields) for config in named]
    arguments = methods.arguments()
    named_models.folder_of(model)
    texts, encoded = _prompts(model, prompts, encoded_prompts)
    check_writable_folder(out)
    unfinished = out.with_name(out.name + ".unfinished")
    rounds_on_data = ROUNDINGS.find(arguments["reconstruction"].rounding).needs_samples
    tunes = methods.fine_tuning is not None or methods.search_combination
    if rounds_on_data or tunes or measures(methods.allocation):
        arguments |= {"checkpoint_dir": unfinished / "blocks", "cache_dir": unfinished / "samples"}
    elif memory is not None:
        arguments |= {"checkpoint_dir": unfinished / "blocks"}
    arguments |= {
        "prompts": texts or None,
        "samples": samples,
        "skip": skip,
        "seed": seed,
        "fields": fields,
        "layers": layers,
        "memory": memory,
    }
    with joined() as world, contextlib.ExitStack() as stack:
        world.agreed(lambda: _claim(stack, out, unfinished, resume))
        if not methods.search_combination and not needs_data(
            configs, resolve_transforms(methods.transforms), arguments["reconstruction"], methods.fine_tuning
        ):  # weights stay in their file until each is rounded, on the GPU if there is one
            device = device or "cpu"
        pipe = named_models.open_pipeline(model, device, dtype=dtype, text_encoders=not encoded)
        arguments |= {name: x.to(pipe.device) for name, x in encoded.items()}
        start = time.perf_counter()
        with _kept(unfinished) if world.first else contextlib.nullcontext():
            quantized = quantize_pipeline(pipe, recipe, **arguments, progress=world.first, **call)
            if not world.first:
                return  # the first process writes
            quantized.save_pretrained(out)
        if quantized.transformer.report is not None:
            print(quantized.transformer.report.to_markdown(), end="\n\n")
            write_text(out / "reconstruction.md", quantized.transformer.report.to_markdown() + "\n")
        if (tried := quantized.transformer.combination_report) is not None:
            print(tried.to_markdown(), end="\n\n")
        if (tuned := quantized.transformer.fine_tuning_report) is not None:
            print(tuned.sentence())
        shutil.rmtree(unfinished, ignore_errors=True)
        print(sizes(pipe.transformer, quantized.transformer))
        print(f"saved after {time.perf_counter() - start:.0f} s: {out}")
        print(f"next: fp4dit-ao generate {out} --compare {model} --prompt {(texts or [PROMPT])[0]!r}")


def _claim(stack: contextlib.ExitStack, out: Path, unfinished: Path, resume: bool) -> None:
    """Keeps other processes from ``out`` until ``stack`` ends.

    Raises:
        OSError: another run writes there, or one has: finished, or unfinished and not to be resumed.
    """
    stack.enter_context(only_process(out))
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"cannot save to {out}: the folder is not empty; name a new one, or empty it")
    if unfinished.exists() and not resume:
        raise FileExistsError(f"{unfinished} holds an unfinished run; continue it with --resume, or delete it")


def _prompts(model: str, prompts: Path | None, encoded: Path | None) -> tuple[list[str], dict[str, Tensor]]:
    """Calibration prompts, as texts or encoded."""
    if encoded is None:
        texts = read_prompts(prompts) if prompts else named_models.default_prompts(model, CALIBRATION_PROMPTS)
        return texts, {}
    if prompts is not None:
        raise ValueError("--prompts and --encoded-prompts both give the calibration prompts; leave one out")
    return [], read_encoded_prompts(encoded)


def sizes(before: nn.Module, after: QuantizedTransformer) -> str:
    """One sentence: bytes of a transformer, float and quantized, as they are stored, and with 16 bits for all that is not
    quantized, as reports count them."""
    stored = sum(x.nbytes for x in before.parameters()), after.nbytes()
    (float_size, _), (size, bits) = (named_models.size_at_16_bits(model) for model in (before, after))
    rest = str(after.dtype).removeprefix("torch.")
    return (
        f"transformer: {stored[0] / 1e6:.2f} MB → {stored[1] / 1e6:.2f} MB as stored, {bits:.2f} bits per quantized "
        f"weight and the rest in {rest}; with 16 bits for that, {float_size / 1e6:.2f} MB → {size / 1e6:.2f} MB"
    )


@contextlib.contextmanager
def _kept(unfinished: Path) -> Iterator[None]:
    """Context whose failures say what is kept in ``unfinished``, and how to go on; without finished parts it is deleted."""
    try:
        yield
    except BaseException as error:
        if any(unfinished.glob("blocks/**/*.safetensors")) or (
            isinstance(error, KeyboardInterrupt) and any(unfinished.glob("samples/*"))
        ):
            error.add_note(
                f"finished work is kept in {unfinished}: go on with the same command and --resume, or delete it"
            )
        else:
            shutil.rmtree(unfinished, ignore_errors=True)  # holds nothing that a resumed run would reuse
        raise
