"""Calibration samples from a pipeline's own denoising trajectories.

A sample is the keyword arguments of one ``pipe.transformer`` forward, exactly as the pipeline passes them: both halves
of guidance in one batch if the pipeline batches them, the scheduler's timesteps, the text embeddings.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree
from fp4dit_ao.calibration import sample_cache
from fp4dit_ao.calibration.observation import device_of
from fp4dit_ao.calibration.pipeline_arguments import CallArguments, call_arguments
from fp4dit_ao.calibration.recording import Enough, Recorder
from fp4dit_ao.calibration.sample_cache import Sample
from fp4dit_ao.calibration.sample_selection import SELECTIONS, check_chosen
from fp4dit_ao.calibration.uncomputed_calls import is_uncomputed
from fp4dit_ao.graph_capture.sample_description import tensors
from fp4dit_ao.util.placement import on_device
from fp4dit_ao.util.plain_mode import plain_mode
from fp4dit_ao.util.world import current

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LABELS = "class_labels"
"""Argument of class-conditional pipelines that takes the place of prompts."""
MEMORY_LIMIT = 4 * 2**30
"""Default limit of all samples together, in bytes."""


@plain_mode()
def collect_samples(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str] | None = None,
    *,
    steps: int | None = None,
    seed: int = 0,
    samples: int | None = 128,
    batch_size: int = 1,
    selection: str = "uniform",
    component: str = "transformer",
    cache_dir: str | Path | None = None,
    memory_limit_bytes: int = MEMORY_LIMIT,
    progress: bool = True,
    **call: object,
) -> list[Sample]:
    """Runs the pipeline's denoising loop on ``prompts`` and keeps the inputs of some of its transformer calls.

    With uniform selection every timestep is represented equally and prompts take turns, so ``samples`` calls are spread
    evenly over prompts and timesteps. The choice is deterministic. Each batch of prompts starts from noise of its own
    seed. No image is decoded. Inside of :func:`fp4dit_ao.util.world.joined`, processes share out the batches; each gets all
    samples, and the first one writes the cache.

    Args:
        pipe: a diffusers pipeline with a float transformer.
        prompts: None if precomputed embeddings are given in ``call`` (``prompt_embeds``, ``prompt_attention_mask``, …;
            one row a prompt, tensors with one row shared by all), so that the text encoder need not be in memory; or if
            ``class_labels`` are, as for ``DiTPipeline``.
        steps: denoising steps; the pipeline's own default if None.
        samples: number of transformer calls to keep; None keeps all, 1 keeps the first.
        batch_size: prompts in one call of the pipeline, and so in one sample.
        selection: which calls are kept; a name in :data:`fp4dit_ao.calibration.sample_selection.SELECTIONS`.
        component: name of the transformer among the pipeline's components, such as ``"transformer_2"``.
        cache_dir: folder for the samples, which are reused while weights, prompts and settings stay the same.
        memory_limit_bytes: limit of all samples together. If they would exceed it, fewer are selected, with a warning;
            if not even one fits, it is an error. Tensors that several samples share count once.
        progress: show a progress bar with the time left.
        call: further arguments of the pipeline (``guidance_scale``, ``height``, …), on top of its ``generation.json``.

    Returns:
        Keyword arguments of ``pipe.transformer.forward``, on the pipeline's device.

    Raises:
        ValueError: no transformer or no call of it, calls of more than one kind, no prompts, an unknown argument or
            selection, a selection that needs the features of blocks in a transformer without any, or a limit too small for
            one sample.
    """
    SELECTIONS.find(selection)
    transformer = getattr(pipe, component, None)
    if not isinstance(transformer, nn.Module):
        raise ValueError(
            f"{type(pipe).__name__} has no {component}; calibration needs a diffusion transformer's pipeline"
        )
    if samples is not None and samples < 1:
        raise ValueError(f"samples={samples}; at least one is needed")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; at least one prompt a call is needed")
    arguments = call_arguments(pipe, **call)
    if steps is not None:
        arguments["num_inference_steps"] = steps
    batches = _batches(pipe, prompts, arguments, batch_size)
    world = current()
    key = None
    if cache_dir is not None:
        settings = {
            "prompts": prompts,
            "seed": seed,
            "samples": samples,
            "batch": batch_size,
            "limit": memory_limit_bytes,
            "selection": selection,
        }
        if component != "transformer":
            settings["component"] = component
        key = sample_cache.fingerprint(pipe, settings, arguments)
        found = world.agreed(partial(sample_cache.load, cache_dir, key, torch.device("cpu")))
        if found is not None:
            return on_device(found, device_of(transformer))
    kept = _collect(pipe, transformer, batches, seed, samples, selection, memory_limit_bytes, progress and world.first)
    if cache_dir is not None and key is not None and world.first:
        sample_cache.save(cache_dir, key, kept)
        if device_of(transformer).type == "cpu":  # mapped from the file, they take no memory that others need
            return sample_cache.load(cache_dir, key, torch.device("cpu")) or kept
    return kept


def _batches(
    pipe: "DiffusionPipeline", prompts: Sequence[str] | None, arguments: CallArguments, size: int
) -> list[CallArguments]:
    """Keyword arguments of the pipeline for every batch of prompts."""
    if isinstance(prompts, str):
        prompts = [prompts]
    embeddings = {name: v for name, v in arguments.items() if "prompt" in name and isinstance(v, Tensor) and v.ndim}
    labels: Sequence[int] | Tensor = arguments.get(_LABELS, ())
    if not prompts and "prompt_embeds" not in embeddings and not labels:
        raise ValueError("calibration needs prompts; give a list of them, or prompt_embeds computed beforehand")
    embedded = embeddings.get("prompt_embeds")
    count = len(prompts or (labels if embedded is None else embedded))
    batches = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        batch = {name: v for name, v in arguments.items() if name not in embeddings} | {"output_type": "latent"}
        for name, value in embeddings.items():
            if len(value) not in (1, count):
                raise ValueError(
                    f"{name} has {len(value)} rows for {count} prompts; give one row a prompt, or one for all"
                )
            batch[name] = value[start:stop] if len(value) == count else value.expand(stop - start, *value.shape[1:])
        if prompts:
            batch["prompt"] = list(prompts[start:stop])
        elif labels:
            batch[_LABELS] = labels[start:stop]
        if "negative_prompt_embeds" in embeddings:
            batch.setdefault("negative_prompt", None)
        batches.append(batch)
    return batches


def _collect(
    pipe: "DiffusionPipeline",
    transformer: nn.Module,
    batches: list[CallArguments],
    seed: int,
    samples: int | None,
    selection: str,
    limit: int,
    progress: bool,
) -> list[Sample]:
    choose, world = SELECTIONS.find(selection), current()
    bar = tqdm(desc="calibration data", unit="call", disable=not progress)
    bar_settings = _compat.progress_bar_config(pipe)
    pipe.set_progress_bar_config(disable=True)

    def run(index: int, wanted: set[int] | None, to_the_end: bool = False) -> Recorder:
        recorder = Recorder(transformer, bar, wanted, to_the_end)
        hook = transformer.register_forward_pre_hook(recorder, with_kwargs=True)
        try:
            # a CPU generator, so that the noise does not depend on the device
            pipe(**batches[index], generator=torch.Generator().manual_seed(seed + index))
        except Enough:
            pass
        finally:
            hook.remove()
        return recorder

    try:
        with torch.no_grad():
            with _features_kept(transformer, choose.needs_features) as features:
                # calls that cost nothing are all looked at: a second kind may come late
                first = run(0, {0} if samples == 1 else None, to_the_end=is_uncomputed(transformer))
            if not first.calls:
                name = next(key for key, value in pipe.components.items() if value is transformer)
                raise ValueError(
                    f"{type(pipe).__name__} made no call of its {name}; give more num_inference_steps, so that it takes part"
                )
            calls = 1 if samples == 1 else first.calls
            wanted = len(batches) * calls if samples is None else min(samples, len(batches) * calls)
            wanted = _fit(list(first.kept.values()), wanted, len(batches), limit)
            chosen = world.agreed(
                partial(choose, calls, len(batches), wanted, torch.stack(features[:calls]) if features else None)
            )
            check_chosen(chosen, calls, len(batches), wanted, selection)
            own = sorted(chosen)[world.rank :: world.size]
            bar.total = first.calls + sum(max(chosen[index]) + 1 for index in own if index)
            bar.refresh()
            found = {}
            for index in own:
                recorded = first.kept if index == 0 else run(index, set(chosen[index])).kept
                found[index] = [recorded[call] for call in chosen[index]]
    finally:
        bar.close()
        pipe.set_progress_bar_config(**bar_settings)
    everyone: dict[int, list[Sample]] = {}
    for rank, part in enumerate(world.gathered(found)):
        everyone |= found if rank == world.rank else on_device(part, device_of(transformer))
    return [sample for _, kept in sorted(everyone.items()) for sample in kept]


@contextlib.contextmanager
def _features_kept(transformer: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """While open, keeps the features of every call: the middle block's output, averaged over tokens, as float32 on the
    CPU.

    Args:
        transformer: its longest ``nn.ModuleList`` holds the blocks.
        wanted: False keeps nothing.

    Raises:
        ValueError: features are wanted and there are no blocks.
    """
    features: list[Tensor] = []
    if not wanted:
        yield features
        return
    blocks: Sequence[nn.Module] = max(
        ([*m] for m in transformer.modules() if isinstance(m, nn.ModuleList)), key=len, default=[]
    )
    if not blocks:
        raise ValueError(
            f"{type(transformer).__name__} has no nn.ModuleList of blocks to take features from; use selection='uniform'"
        )

    def keep(module: nn.Module, args: object, output: object) -> None:
        x = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)).float()
        features.append((x.flatten(1, -2).mean(1) if x.ndim > 2 else x).flatten().cpu())

    hook = blocks[len(blocks) // 2].register_forward_hook(keep)
    try:
        yield features
    finally:
        hook.remove()


def size_in_bytes(samples: Sequence[Mapping[str, object]]) -> int:
    """Bytes of all tensors of ``samples``; tensors that several samples share count once."""
    seen = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for s in samples for _, x in tensors(s)}
    return sum(seen.values())


def _fit(trajectory: list[Sample], wanted: int, batches: int, limit: int) -> int:
    """Number of samples, at most ``wanted``, that fit into ``limit`` bytes, estimated from one trajectory.

    Raises:
        ValueError: not even one sample fits.
    """
    one, all_ = size_in_bytes(trajectory[:1]), size_in_bytes(trajectory)
    each = (all_ - one) // (len(trajectory) - 1) if len(trajectory) > 1 else one
    shared = max(one - each, 0)

    def total(count: int) -> int:
        return min(count, batches) * shared + count * each

    if total(1) > limit:
        raise ValueError(
            f"one calibration sample takes {one:,} bytes, over memory_limit_bytes={limit:,}; raise the limit"
        )
    if total(wanted) <= limit:
        return wanted
    low, high = 1, wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= limit else (low, middle)
    found = f"{total(wanted):,} bytes exceed memory_limit_bytes={limit:,}"
    warnings.warn(f"keeping {low} of {wanted} calibration samples: {found}", stacklevel=3)
    return low
