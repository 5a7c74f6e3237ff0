"""``FP4DiTQuantizer``: says which edges of an aten graph are quantized, and to what. It only annotates."""

import dataclasses
import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    EdgeOrNode,
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)

from fp4dit_ao.config import QuantConfig
from fp4dit_ao.formats import parse
from fp4dit_ao.observers.log_probability import LogProbabilityObserver
from fp4dit_ao.passes.graph_products import (
    CONVOLUTIONS,
    DECOMPOSED,
    TRANSPARENT,
    is_other_attention,
    linear_name,
    module_name,
    module_types,
    named_products,
    owner_name,
    stored_operand,
    why_other,
)
from fp4dit_ao.passes.transforms.attention_products import AttentionProducts, attention_products, split_attention
from fp4dit_ao.passes.transforms.low_rank import adds_branch
from fp4dit_ao.passes.transforms.split_inputs import SplitInputs, part_name, whole_name
from fp4dit_ao.passes.transforms.timestep_ranges import adds_range
from fp4dit_ao.schemes import scheme_of
from fp4dit_ao.schemes.scheme import ObserverSpec

ANNOTATION = "quantization_annotation"
_ATEN = torch.ops.aten
_GATES = (_ATEN.gelu.default, _ATEN.silu.default)


@dataclass(frozen=True)
class Decision:
    """What became of one linear, attention or convolution, for reports.

    Attributes:
        name: fully qualified module name.
        kind: ``"linear"``, ``"attention"`` or ``"convolution"``.
        config: its recipe, with ``weight`` and ``group_size`` resolved; None where left in high precision.
        reason: why it was left, or which rule chose its format.
    """

    name: str
    kind: Literal["linear", "attention", "convolution"]
    config: QuantConfig | None
    reason: str


class FP4DiTQuantizer(Quantizer):  # type: ignore[misc]
    """A torchao PT2E quantizer for diffusion transformers.

    ``FP4DiTQuantizer().set_global(w4a6()).set_module_name("transformer_blocks.0.*", None)``: the last rule that matches
    a module wins, and ``None`` leaves it in high precision. Attention follows the config of its module's name.

    Attributes:
        decisions: after ``prepare_pt2e``, a :class:`Decision` for every linear, attention and convolution of the graph.
    """

    def __init__(self) -> None:
        self._rules: list[tuple[str, str, QuantConfig | None]] = []
        self.decisions: dict[str, Decision] = {}

    def set_global(self, config: QuantConfig | None) -> "FP4DiTQuantizer":
        """Use ``config`` for every module that its own ``skip`` globs do not name."""
        self._rules.append(("global", "", _checked("set_global", config)))
        return self

    def set_module_name(self, glob: str, config: QuantConfig | None) -> "FP4DiTQuantizer":
        """Use ``config`` for modules whose fully qualified name matches ``glob`` (``*`` also crosses dots)."""
        self._rules.append(("name", _checked_glob("set_module_name", glob), _checked("set_module_name", config)))
        return self

    def set_module_pattern(self, glob: str, config: QuantConfig) -> "FP4DiTQuantizer":
        """Use ``config`` for modules whose name matches ``glob``, if there are any, and that its own ``skip`` globs do not
        name: what is known of many models, where :meth:`set_module_name` is said of one."""
        self._rules.append(
            ("pattern", _checked_glob("set_module_pattern", glob), _checked("set_module_pattern", config))
        )
        return self

    def set_module_type(self, module_type: type[nn.Module], config: QuantConfig | None) -> "FP4DiTQuantizer":
        """Use ``config`` for modules of that type and everything inside them."""
        if not isinstance(module_type, type) or not issubclass(module_type, nn.Module):
            raise ValueError(
                f"set_module_type({module_type!r:.60}, …): give a class of modules, such as torch.nn.Linear"
            )
        kind = f"{module_type.__module__}.{module_type.__qualname__}"
        self._rules.append(("type", kind, _checked("set_module_type", config)))
        return self

    @property
    def configs(self) -> list[QuantConfig]:
        """Every config that a rule may give a module."""
        return [config for _, _, config in self._rules if config is not None]

    # --- torchao's interface -----------------------------------------------------------------------------------------

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Split the linears whose config says ``split_inputs``, and attention with quantized probabilities into products."""
        split = SplitInputs(wanted=self._splits)
        split.fit(model)
        split.apply(model)
        for node in list(model.graph.nodes):
            if node.target is _ATEN.scaled_dot_product_attention.default:
                config, _ = self._config(module_name(node), module_types(node))
                if config is not None and config.attention_probabilities is not None:
                    split_attention(model, node)
        model.graph.lint()
        model.recompile()
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        self._refuse_unmatched(model)
        self.decisions = {}
        shared: dict[tuple[object, ...], EdgeOrNode] = {}
        products = attention_products(model)
        for found in products:
            self._annotate_products(found, shared)
        split = {node for found in products for node in (found.result, found.scores)}
        for node in model.graph.nodes:
            if node in split:
                continue
            if node.target is _ATEN.linear.default:
                self._annotate_linear(node, shared)
            elif node.target is _ATEN.scaled_dot_product_attention.default:
                self._annotate_attention(node, shared)
            elif node.target in CONVOLUTIONS:
                name = linear_name(node)
                self.decisions[name] = Decision(name, "convolution", None, "convolutions are not quantized")
            elif (stored := stored_operand(node)) is not None:
                self.decisions.setdefault(stored[0], Decision(stored[0], "linear", None, stored[1]))
            elif is_other_attention(node):
                name = module_name(node)
                if self.decisions.get(name) is None or self.decisions[name].config is None:
                    self.decisions[name] = Decision(name, "attention", None, why_other(node))
        return model

    def validate(self, model: GraphModule) -> None:
        if any(decision.config for decision in self.decisions.values()):
            return
        decomposed = next((node for node in model.graph.nodes if node.target in DECOMPOSED), None)
        linear = any(node.target is _ATEN.linear.default for node in model.graph.nodes)
        if decomposed is not None and not linear:
            raise ValueError(
                f"this graph has no linear, but products such as {decomposed.target} ({decomposed.name}); export the model "
                "without run_decompositions, which takes linears apart"
            )
        raise ValueError(
            "nothing in this graph would be quantized; call set_global(w4a6()), and check that skip globs leave a linear"
        )

    # --- rules -------------------------------------------------------------------------------------------------------

    def config_for(self, name: str) -> tuple[QuantConfig | None, str]:
        """The config of the module ``name``, by the rules that go by name, and which rule that was."""
        return self._config(name, ())

    def _config(self, name: str, types: tuple[str, ...], owner: str = "") -> tuple[QuantConfig | None, str]:
        """The config of module ``name`` inside modules of ``types``, and the reason; parts of a module are the module, too, and
        so are its weights (``owner`` is the module of one that has a name of its own)."""
        names = (name, whole_name(name), owner or name)
        for kind, key, config in reversed(self._rules):
            if kind == "name" and any(fnmatchcase(name, key) for name in names):
                return config, f"name matches {key!r}"
            if kind == "type" and key not in types:
                continue
            if kind == "pattern" and not any(fnmatchcase(name, key) for name in names):
                continue
            if kind in ("global", "type", "pattern"):
                rule = f"name matches {key!r}" if kind == "pattern" else f"{kind} rule"
                if config is None:
                    return None, rule
                glob = next((glob for glob in config.skip if any(fnmatchcase(name, glob) for name in names)), None)
                return (None, f"recipe keeps {glob!r}") if glob else (config, rule)
        return None, "no rule"

    def _splits(self, node: Node) -> bool:
        """Whether a linear's config, or that of its parts, says that it is split."""
        name = linear_name(node)
        configs = [self._config(found, module_types(node), owner_name(node))[0] for found in (name, part_name(name, 0))]
        return any(config is not None and config.split_inputs for config in configs)

    def _refuse_unmatched(self, model: GraphModule) -> None:
        """A name rule that matches no module is a typing mistake; saying nothing would leave the user believing it."""
        names = [found for n in named_products(model) for found in (module_name(n), linear_name(n), owner_name(n))]
        names += [whole_name(name) for name in names]
        for kind, glob, _ in self._rules:
            if kind == "name" and not any(fnmatchcase(name, glob) for name in names):
                close = difflib.get_close_matches(glob, names, n=1, cutoff=0.3)
                hint = f"; did you mean {close[0]!r}" if close else ""
                raise ValueError(f"set_module_name({glob!r}, …) matches no linear or attention of this graph{hint}")

    # --- annotations -------------------------------------------------------------------------------------------------

    def _annotate_linear(self, node: Node, shared: dict[tuple[object, ...], EdgeOrNode]) -> None:
        name = linear_name(node)
        source, weight = node.args[0], node.args[1]
        config, reason = self._config(name, module_types(node), owner_name(node))
        assert isinstance(source, Node) and isinstance(weight, Node)
        if config is not None and config.weight is None and not config.weight_candidates:
            config, reason = None, "its config names no weight format"
        if config is not None and weight.op != "get_attr":
            config, reason = None, "its weight is computed, not stored"
        if config is not None:
            config, reason = fit_group(name, int(weight.meta["val"].shape[-1]), config, reason)
        if config is not None and config.pre_gelu_weight is not None and reaches_gate(node):
            config = dataclasses.replace(config, weight=config.pre_gelu_weight, weight_candidates=())
            reason += ", before a gate"
        unique = name if weight.op == "get_attr" or name not in self.decisions else f"{name}#{node.name}"
        self.decisions[unique] = Decision(name, "linear", config, reason)
        if config is None:
            return
        observer = scheme_of(config).weight_observer(config).constructor(name=str(weight.target))
        spec = QuantizationSpec(dtype=torch.uint8, observer_or_fake_quant_ctr=observer)
        specs: dict[Node, QuantizationSpecBase | None] = {weight: spec}
        if config.activation is not None:
            gram = config.weights_need_data
            specs[source] = _activation_spec(source, node, config.activation, config, f"{name}.input", gram, shared)
        node.meta[ANNOTATION] = QuantizationAnnotation(specs, allow_implicit_sharing=False, _annotated=True)

    def _annotate_products(self, found: AttentionProducts, shared: dict[tuple[object, ...], EdgeOrNode]) -> None:
        name = module_name(found.result)
        config, reason = self._config(name, module_types(found.result))
        unique = name if name not in self.decisions else f"{name}#{found.result.name}"
        self.decisions[unique] = Decision(name, "attention", config, reason)
        if config is None or config.probability_bits is None:
            return
        readers: dict[Node, dict[Node, QuantizationSpecBase | None]] = {}
        for role, (source, reader) in zip("qkv", found.edges, strict=True):
            if config.attention is not None:
                spec = _activation_spec(source, reader, config.attention, config, f"{name}.{role}", False, shared)
                readers.setdefault(reader, {})[source] = spec
        observer = ObserverSpec(
            LogProbabilityObserver, {"bits": config.probability_bits, "keep_first": found.keeps_first}
        )
        make = observer.constructor(name=f"{name}.probabilities")
        spec = QuantizationSpec(dtype=torch.uint8, observer_or_fake_quant_ctr=make)
        readers.setdefault(found.result, {})[found.probabilities] = spec
        for reader, specs in readers.items():
            reader.meta[ANNOTATION] = QuantizationAnnotation(specs, allow_implicit_sharing=False, _annotated=True)

    def _annotate_attention(self, node: Node, shared: dict[tuple[object, ...], EdgeOrNode]) -> None:
        name = module_name(node)
        config, reason = self._config(name, module_types(node))
        if config is not None and config.attention is None:
            config, reason = None, "its config names no attention format"
        unique = name if name not in self.decisions else f"{name}#{node.name}"
        self.decisions[unique] = Decision(name, "attention", config, reason)
        if config is None or config.attention is None:
            return
        specs: dict[Node, QuantizationSpecBase | None] = {}
        for role, source in zip("qkv", node.args[:3], strict=True):
            assert isinstance(source, Node)
            if source not in specs:
                specs[source] = _activation_spec(
                    source, node, config.attention, config, f"{name}.{role}", False, shared
                )
        node.meta[ANNOTATION] = QuantizationAnnotation(specs, allow_implicit_sharing=False, _annotated=True)


def _checked(setter: str, config: QuantConfig | None) -> QuantConfig | None:
    """``config``; raises ``ValueError`` if it is something else, such as the name of a recipe."""
    if config is not None and not isinstance(config, QuantConfig):
        found = f"{config!r:.60}" if isinstance(config, str) else getattr(config, "__name__", type(config).__name__)
        raise ValueError(
            f"{setter}: found {found} for a config; give a QuantConfig, such as w4a6() or "
            "QuantConfig.from_name('w4a6'), or None"
        )
    return config


def _checked_glob(setter: str, glob: str) -> str:
    if not isinstance(glob, str):
        raise ValueError(f"{setter}: found {glob!r:.60} for a name; give a text, such as 'transformer_blocks.0.*'")
    return glob


def reaches_gate(node: Node) -> bool:
    """Whether the output of ``node`` reaches a GELU or SiLU through nothing but views, chunks, casts, dropout and the sum with
    a low-rank branch, or the range and bias that were taken out of a linear."""
    for user in node.users:
        if user.target in _GATES:
            return True
        passes = user.target in TRANSPARENT or getattr(user.target, "__name__", "") == "getitem"
        passes = passes or adds_branch(user, node) or adds_range(user, node)
        if passes and user.args[0] is node and reaches_gate(user):
            return True
    return False


def _activation_spec(
    source: Node,
    user: Node,
    fmt: str,
    config: QuantConfig,
    name: str,
    gram: bool,
    shared: dict[tuple[object, ...], EdgeOrNode],
) -> QuantizationSpecBase:
    """One observer per (tensor, observer, format): q, k and v projections of one input share it, and quantize once."""
    scheme = scheme_of(config)
    is_linear = user.target is _ATEN.linear.default
    observer = scheme.input_observer(config, fmt) if is_linear else scheme.attention_observer(config, fmt)
    key = (source, observer.key, gram)
    if key in shared:
        return SharedQuantizationSpec(shared[key])
    shared[key] = (source, user)
    constructor = observer.constructor(name=name, collect_gram=gram)
    return QuantizationSpec(dtype=torch.uint8, observer_or_fake_quant_ctr=constructor)


def fit_group(name: str, features: int, config: QuantConfig, reason: str) -> tuple[QuantConfig | None, str]:
    """The config with a group size that divides ``features``, as its ``indivisible`` field asks.

    Raises:
        ValueError: it does not divide, and the config says to refuse (or no divisor serves); or two codes share a byte, and
            ``features`` is odd.
    """
    if features % 2 and config.weight_granularity != "group" and _fewest_bits(config) <= 4:
        if config.indivisible != "error":
            return None, f"its {features} inputs are odd, and two codes of 4 bits share a byte"
        raise ValueError(
            f"{name}: its {features} input features are odd, and two codes of 4 bits share a byte; use indivisible='keep' or "
            f"set_module_name({name!r}, None) to leave it as it is"
        )
    if config.weight_granularity != "group" or features % config.group_size == 0:
        return config, reason
    if config.indivisible == "keep":
        return None, f"groups of {config.group_size} do not divide its {features} inputs"
    sizes = [g for g in range(16, config.group_size, 16) if features % g == 0]
    if config.indivisible == "divisor":
        if not sizes:
            return None, f"no multiple of 16 divides its {features} inputs"
        return dataclasses.replace(config, group_size=sizes[-1]), f"{reason}, groups of {sizes[-1]}"
    other = "" if features % 2 else ", or weight_granularity='channel'"
    raise ValueError(
        f"{name}: groups of {config.group_size} do not divide its {features} input features; "
        f"use a group_size that does, indivisible='divisor' or 'keep'{other}"
    )


def _fewest_bits(config: QuantConfig) -> int:
    """Bits of a code in the smallest of the formats that a weight may get."""
    names = [config.weight, config.pre_gelu_weight, *config.weight_candidates]
    return min(parse(name).bits for name in names if name is not None)
