"""QuEST (arXiv 2402.03666): of all layers, those trained that carry the timestep and those that lose most by few bits.

Which ones, without names of layers:

- *time*: linears that see one vector per image, not tokens: modulation and embeddings, as far as the recipe quantizes them;
- *sensitive*: of the others those whose quantization alone, all else in full precision, moves the model's output most, as
  long as they hold at most ``share`` of the quantized weights (7 %, the paper's bound of what is trained).

Their weights are trained through their rounding, their biases too, and static input ranges of *all* layers. The loss is local
and global supervision: the error of the model's outputs, and the mean error of the chosen layers' outputs, all relative.

Differences: the code goes by names (``emb_layer``, then ``ff.net``, in one model also ``to_q`` and self-attention's k and v),
in two stages, timestep by timestep, with a step for each input channel and timestep; it adds the outputs' error once for each
layer. Here one stage trains both kinds, on samples from all timesteps, and inputs have no trained steps where they are
quantized online.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fp4dit_ao.observers import FloatObserver, WeightObserver
from fp4dit_ao.passes.fine_tuning.activation_range import RANGE_PACE
from fp4dit_ao.passes.fine_tuning.biases import bias_of
from fp4dit_ao.passes.fine_tuning.blockwise import BlockwiseModel
from fp4dit_ao.passes.fine_tuning.distillation import Course, Distilled, Lesson, computing_floats
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS
from fp4dit_ao.passes.fine_tuning.full_weights import LR
from fp4dit_ao.passes.fine_tuning.latent_weight import FullWeight
from fp4dit_ao.passes.model_error import relative_error, total_error
from fp4dit_ao.passes.partition import quantized_linears

PROBES = 4
"""Samples that sensitivity is measured on, evenly spread."""
BIAS_PACE = 1.0
"""Learning rate of biases, in parts of their mean magnitude, over that of weights in steps."""


class LayerLoss:
    """The error of the outputs, and the mean error of some layers' outputs.

    Args:
        lesson: of the model.
        layers: linears of the prepared graph.
    """

    def __init__(self, lesson: Lesson, layers: Sequence[Node]):
        self.lesson = lesson
        self.model = BlockwiseModel(
            lesson.prepared, lesson.config.checkpoint_activations, [node.name for node in layers]
        )

    def __call__(self, index: int) -> Tensor:
        call = self.lesson.calls[index]
        with torch.no_grad(), computing_floats(self.lesson.prepared):
            _, wanted = self.model.run(call)
        outputs, found = self.model.run(call)
        error = relative_error(outputs, self.lesson.targets[index])
        return error + relative_error(found, wanted) if wanted else error


def time_layers(prepared: GraphModule) -> list[Node]:
    """Linears whose input is one vector per image: two dimensions."""
    return [node for node in quantized_linears(prepared) if _rank(node.args[0]) == 2]


def _rank(node: object) -> int:
    while isinstance(node, Node) and node.op == "call_module":  # an observer has no metadata of its own
        node = node.args[0]
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.ndim if isinstance(value, Tensor) else 0


def sensitivities(lesson: Lesson, nodes: Iterable[Node]) -> dict[Node, float]:
    """The relative squared error of the model's output with each of these linears alone quantized, weight and input."""
    count = len(lesson.calls)
    probes = sorted({(2 * i + 1) * count // (2 * PROBES) for i in range(PROBES)})
    calls, targets = [lesson.calls[i] for i in probes], [lesson.targets[i] for i in probes]
    found = {}
    for node in nodes:
        with computing_floats(lesson.prepared):
            for observer in _observers(lesson.prepared, node):
                observer.paused, observer.fake_quantize = False, True
            found[node] = total_error(lesson.prepared, calls, targets)
    return found


def _observers(prepared: GraphModule, node: Node) -> list[FloatObserver]:
    """Observers of a linear's input and weight."""
    sources = [each for each in node.args[:2] if isinstance(each, Node) and each.op == "call_module"]
    modules = [prepared.get_submodule(str(each.target)) for each in sources]
    return [module for module in modules if isinstance(module, FloatObserver)]


def chosen_layers(lesson: Lesson) -> list[Node]:
    """The linears that are trained, in the order of the graph: the most sensitive one even where ``share`` holds none."""
    time, every = time_layers(lesson.prepared), quantized_linears(lesson.prepared)
    budget = lesson.config.share * sum(weight.numel() for weight in lesson.weights.values())
    chosen = set(time)
    errors = sensitivities(lesson, [node for node in every if node not in chosen])
    for node in sorted(errors, key=lambda node: -errors[node]):
        size = lesson.weights[weight_observer(lesson.prepared, node)].numel()
        if size <= budget or not chosen:
            chosen.add(node)
            budget -= size
    return [node for node in every if node in chosen]


def weight_observer(prepared: GraphModule, node: Node) -> WeightObserver:
    """The observer of a linear's weight."""
    return next(x for x in _observers(prepared, node) if isinstance(x, WeightObserver))


def plan(lesson: Lesson) -> Course:
    """The chosen layers and their errors. ``lr`` is in steps of the format."""
    layers = chosen_layers(lesson)
    by = lesson.config.optimizer or "adam"
    lr = lesson.config.lr or LR[by]
    observers = [weight_observer(lesson.prepared, node) for node in layers]
    students = {x: FullWeight(lesson.weights[x], x, by) for x in observers}
    return Course(
        dict(students), LayerLoss(lesson, layers), lr, lesson.config.rank,
        biases=[name for name in map(bias_of, layers) if name is not None and name in lesson.biases], bias_lr=lr * BIAS_PACE,
        range_lr=lr * RANGE_PACE,
    )  # fmt: skip


FINE_TUNINGS.register(
    "quest", Distilled("quest", plan, with_biases=True),
    summary="Trains the layers that carry the timestep and those that lose most by few bits, on local and global error.",
    source="QuEST, arXiv 2402.03666", cost="a forward for each layer and probe; then as 'efficientdm', plus a forward a step",
)  # fmt: skip
