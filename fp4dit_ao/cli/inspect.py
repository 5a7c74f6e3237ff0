"""``fp4dit-ao inspect``: layer by layer, what became of a quantized pipeline, and what that is worth on this machine."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor
from tqdm.auto import tqdm

from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer, load_graph
from fp4dit_ao.diffusers_integration.layer_summary import unit_of
from fp4dit_ao.diffusers_integration.weight_forms import low_bit_weights, measured
from fp4dit_ao.evaluation import plots, slow_layers
from fp4dit_ao.evaluation.certificate import Certificate, MeasuredLinear
from fp4dit_ao.evaluation.environment import one_line
from fp4dit_ao.evaluation.layer_timing import LayerSpeed
from fp4dit_ao.graph_capture.layer_rows import LayerRows
from fp4dit_ao.passes.graph_products import weight_named
from fp4dit_ao.passes.transforms.registry import applied_transforms
from fp4dit_ao.schemes import owner_of
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight
from fp4dit_ao.util.markdown import markdown_table


@dataclass(frozen=True)
class Measuring:
    """How layers are measured.

    Attributes:
        tokens: image tokens of a call; those of the captured sample if None.
        again: measure what the user's cache knows.
    """

    tokens: int | None = None
    again: bool = False


def inspect(
    model: str, against: str | None, out: Path | None, device: str | None = None, measuring: Measuring | None = None
) -> None:
    """Print the layers of ``model`` as Markdown, with ``against`` the error of each weight; draw the levels they use.

    Args:
        model: a quantized pipeline's folder or name.
        against: the float pipeline that it was made from.
        out: PNG of the levels that the weights use.
        device: where the layers would run, such as ``"cuda"``; None takes the GPU, if there is one.
        measuring: measure each layer against bfloat16 on the device; None does not.

    Raises:
        ValueError: ``model`` is not quantized, ``against`` is, or this machine has no such device.
    """
    place = _device(device)
    if not named_models.is_quantized(model):
        raise ValueError(
            f"{model} is not quantized by fp4dit_ao, there is nothing to inspect; see 'fp4dit-ao quantize'"
        )
    transformer = load_graph(Path(named_models.folder_of(model)) / "transformer")
    originals = _transformed(_float_weights(against), transformer) if against else {}
    speeds, rows = _measured(transformer, place, measuring)
    print(layer_table(transformer, originals, place, speeds, rows))
    print()
    print(kept_table(transformer))
    print()
    print(footprint(transformer))
    if rows is not None and speeds:
        print(f"\n{certified(transformer, speeds, rows, model)}")
    if out is not None:
        codes = {name: (w.fmt, w.codes.numpy()) for name, w in low_bit_weights(transformer).items()}
        plots.save(plots.level_usage(codes), out)
        print(f"levels that the weights use: {out}")


def _measured(
    transformer: QuantizedTransformer, device: torch.device, measuring: Measuring | None
) -> tuple[dict[str, LayerSpeed], LayerRows | None]:
    if measuring is None:
        return {}, None
    with tqdm(bar_format="{elapsed} {desc}", leave=False) as bar:
        return measured(transformer, device, measuring.tokens, again=measuring.again, progress=bar.set_description_str)


def certified(transformer: QuantizedTransformer, speeds: Mapping[str, LayerSpeed], rows: LayerRows, model: str) -> str:
    """Speed and size of the quantized linears together: how they were measured, a row for each form, and a sentence."""
    sizes = {row.name: row for row in transformer.summary()}
    layers = [
        MeasuredLinear(name, speed, sizes[name].bytes, math.prod(sizes[name].shape or ()))
        for name, speed in speeds.items()
        if name in sizes
    ]
    cast = "" if transformer.dtype == torch.bfloat16 else " --dtype bfloat16"
    command = f'`fp4dit-ao generate {model} --weights auto{cast} --prompt "…"`'
    certificate = Certificate(layers, command)
    own = f", though this model runs in {transformer.dtype}" if cast else ""
    how = (
        f"Measured with bfloat16 tokens in and out, quantized once for all linears that read them{own}, at {rows.tokens} "
        f"image tokens a call (captured with {rows.source}; --tokens takes other numbers, --measure-again repeats it), "
        f"on {one_line()}"
    )
    return f"{how}\n\n{certificate.table()}\n\n{certificate.sentence()}"


def layer_table(
    transformer: QuantizedTransformer,
    originals: dict[str, Tensor],
    device: torch.device,
    speeds: Mapping[str, LayerSpeed] | None = None,
    tokens: LayerRows | None = None,
) -> str:
    """One row per quantized layer: formats, unit on ``device``, bytes, what is measured, and the weight's error.

    Args:
        transformer: the model.
        originals: float weights by name, as they were before rounding; none leaves errors out.
        device: where the layers would run.
        speeds: of the linears, by name; with ``tokens``, the rows that they were measured at.
    """
    weights = low_bit_weights(transformer)
    head = ["layer", "shape", "weight", "input", "runs on", "bytes"]
    head += ["tokens", "ms", "speed / bfloat16"] if speeds else []
    head += ["SQNR, dB", "not nearest"] if originals else []
    head += ["why not faster"] if speeds else []
    rows = []
    for row in transformer.summary():
        if row.quantized:
            cells = [row.name, "×".join(map(str, row.shape or ())) or "q, k, v", row.weight or "", row.activation or ""]
            weight = weights.get(row.name)
            cells += [unit_of(row, weight, device), f"{row.bytes:,}" if row.bytes else ""]
            speed = (speeds or {}).get(row.name)
            seen = tokens.rows[row.name] if speed and tokens else 0
            if speeds:
                cells += [str(seen), f"{speed.seconds * 1e3:.3g}", f"{speed.speed:.2f}"] if speed else [""] * 3
            original = weight_named(originals, row.name)
            if originals:
                cells += ["", ""] if weight is None or original is None else _errors(weight, original)
            if speeds:
                cells.append(slow_layers.reason(weight, device, seen, speed) if speed and weight is not None else "")
            rows.append(cells)
    return markdown_table(head, rows)


def kept_table(transformer: QuantizedTransformer) -> str:
    """Linears that stay in high precision, with the reasons."""
    kept = [row for row in transformer.summary() if not row.quantized]
    if not kept:
        return "Nothing was left in high precision."
    rows = [[row.name, row.weight or row.kind, f"{row.bytes:,}" if row.bytes else "", row.reason] for row in kept]
    return markdown_table(["left in high precision", "type", "bytes", "why"], rows)


def footprint(transformer: QuantizedTransformer) -> str:
    """One sentence: layers by format, bits per weight, bytes."""
    formats = Counter(row.weight for row in transformer.summary() if row.kind == "linear" and row.quantized)
    size, bits = named_models.size_at_16_bits(transformer)
    elements = sum(w.numel() for w in low_bit_weights(transformer).values()) + size_of_rest(transformer)
    counted = ", ".join(f"{count} × {name}" for name, count in formats.most_common())
    return (
        f"{counted}; {bits:.2f} bits per quantized weight, scales included; {size / 1e6:.2f} MB instead of "
        f"{2 * elements / 1e6:.2f} MB, with everything that is not quantized at 16 bits."
    )


def size_of_rest(transformer: QuantizedTransformer) -> int:
    """Number of parameters that are not low-bit."""
    return sum(p.numel() for p in transformer.graph.parameters() if not isinstance(p.detach(), TorchAOBaseTensor))


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name}: this machine has no CUDA device; choose 'cpu'")
    return device


def _errors(weight: LowBitWeight, original: Tensor) -> list[str]:
    """Signal-to-quantization-noise ratio of the weight, and the part of its codes that are not the nearest ones."""
    original = original.float()
    error = weight.dequantize(torch.float32) - original
    sqnr = 10 * torch.log10(original.square().sum() / error.square().sum().clamp(min=1e-30))
    scheme = owner_of(weight)
    if scheme is None:
        return [f"{sqnr:.2f}", ""]
    nearest = scheme.nearest_codes(weight, original)
    return [f"{sqnr:.2f}", f"{float((nearest != weight.codes).float().mean()):.1%}"]


def _transformed(weights: dict[str, Tensor], transformer: QuantizedTransformer) -> dict[str, Tensor]:
    """Float weights as graph transforms left them, without those of which that is not known."""
    for transform in applied_transforms(transformer.graph):
        changed = {name: transform.float_weight(name, x, transformer.graph) for name, x in weights.items()}
        weights = {name: x for name, x in changed.items() if x is not None}
    return weights


def _float_weights(name: str) -> dict[str, Tensor]:
    if named_models.is_quantized(name):
        raise ValueError(f"{name} is quantized itself; --against takes the float model")
    pipe = named_models.open_pipeline(name, "cpu")
    if not hasattr(pipe, "transformer"):
        raise ValueError(f"{name} has no transformer")
    return dict(pipe.transformer.state_dict())
