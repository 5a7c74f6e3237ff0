"""How classes of diffusers take the arguments of ``forward``, where that matters to a graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fp4dit_ao._compat import Keywords


@dataclass(frozen=True)
class Call:
    """Roles of the arguments of one class's ``forward`` when it is captured."""

    shared: tuple[str, ...] = ()
    """Arguments that all rows of a batch share, so that their first dimension is not the batch."""
    batch: Mapping[str, int] = field(default_factory=dict)
    """Dimension of the batch, by argument, where it is not the first."""
    one_a_row: str | None = None
    """Argument that is a list with one item for each row of a batch: a graph has as many rows as the example."""
    adapt: Callable[[Keywords], Keywords] = dict
    """Gives arguments the form that graphs take, equal for all calls that mean the same; raises ``ValueError`` for those
    that no graph takes."""


def call_of(kind: str) -> Call:
    """How the class ``kind`` takes its arguments."""
    return CALLS.get(kind, Call())


def _first(name: str) -> Callable[[Keywords], Keywords]:
    """Replaces the list ``name``, with one equal item for each row of a batch, by its first."""

    def adapt(arguments: Keywords) -> Keywords:
        items = arguments.get(name)
        if not isinstance(items, list) or not items:
            return arguments
        if any(item != items[0] for item in items):
            raise ValueError(
                f"{name} differs from row to row: {str(items)[:80]}; a graph takes a batch of equal ones. Make a batch of "
                "each, or use the module form"
            )
        return arguments | {name: items[:1]}

    return adapt


def _without_caches(arguments: Keywords) -> Keywords:
    """Leaves out caches of keys and values that are neither written nor read."""
    caches = arguments.get("kv_caches")
    if caches is None:
        return arguments
    if {cache.mode for cache in caches.caches} & {"write", "read"}:
        raise ValueError(
            "kv_caches holds keys and values of reference images, which a graph cannot; use the module form: "
            "quantize_modules(pipe.transformer)"
        )
    return arguments | {"kv_caches": None}


def _uncached(arguments: Keywords) -> Keywords:
    if arguments.get("kv_cache") is not None:
        raise ValueError(
            "kv_cache holds keys and values of earlier calls, which a graph cannot; call the pipeline with "
            "use_kv_cache=False, or use the module form: quantize_modules(pipe.transformer)"
        )
    return _first("img_shapes")(arguments)


def _one_image_a_row(arguments: Keywords) -> Keywords:
    """Refuses calls with several images a row, which are told apart by lists of numbers as long as they are."""
    if any(isinstance(images, list) for images in arguments.get("x", ())):
        raise ValueError(
            "x holds several images a row, which a graph cannot take; use the module form: quantize_modules(pipe.transformer)"
        )
    return arguments


def _without_proportional_attention(arguments: Keywords) -> Keywords:
    """Refuses what Lumina-Next's pipeline asks for by default: a scale of attention for each number of tokens."""
    if (arguments.get("cross_attention_kwargs") or {}).get("base_sequence_length") is not None:
        raise ValueError(
            "base_sequence_length scales attention by the logarithm of the number of tokens, which a graph cannot; call the "
            "pipeline with proportional_attn=False, or use the module form: quantize_modules(pipe.transformer)"
        )
    return arguments


def _refused(why: str) -> Callable[[Keywords], Keywords]:
    def adapt(arguments: Keywords) -> Keywords:
        raise ValueError(f"{why}, which a graph cannot; use the module form: quantize_modules(pipe.transformer)")

    return adapt


CALLS: dict[str, Call] = {
    "AnyFlowFARTransformer3DModel": Call(
        adapt=_refused("AnyFlowFARTransformer3DModel keeps keys and values of earlier chunks between its calls")
    ),
    "CosmosTransformer3DModel": Call(shared=("padding_mask",)),
    "GlmImageTransformer2DModel": Call(adapt=_without_caches),
    "HiDreamImageTransformer2DModel": Call(batch={"encoder_hidden_states_llama3": 1}),
    "HunyuanVideoFramepackTransformer3DModel": Call(
        shared=("indices_latents", "indices_latents_clean", "indices_latents_history_2x", "indices_latents_history_4x")
    ),
    "JoyImageEditPlusTransformer3DModel": Call(one_a_row="shape_list"),
    "Kandinsky5Transformer3DModel": Call(shared=("visual_rope_pos", "text_rope_pos")),
    "Kandinsky6SRTransformer3DModel": Call(
        adapt=_refused("Kandinsky6SRTransformer3DModel makes the mask of its flex attention in every call")
    ),
    "LuminaNextDiT2DModel": Call(adapt=_without_proportional_attention),
    "NucleusMoEImageTransformer2DModel": Call(adapt=_first("img_shapes")),
    "OmniGenTransformer2DModel": Call(shared=("input_img_latents",)),
    "QwenImage21Transformer2DModel": Call(adapt=_uncached),
    "QwenImageTransformer2DModel": Call(adapt=_first("img_shapes")),
    "WanAnimate2Transformer3DModel": Call(
        adapt=_refused("WanAnimate2Transformer3DModel keeps keys and values of a reference between its calls")
    ),
    "ZImageTransformer2DModel": Call(adapt=_one_image_a_row),
}
"""Calls by the name of the class; other classes take the defaults of :class:`Call`."""
