"""Codebook groups: each group of a weight has one of sixteen codebooks, each row a float (``formats.codebook_groups``).

Weights are ``CodebookTensor``; inputs are quantized as in the grouped scheme. Token-wise inputs and weights multiply as
integers, in one product a linear.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Node

from fp4dit_ao._compat import Arguments
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.config.scheme_rules import CODEBOOK_GROUPS, SchemeRules
from fp4dit_ao.formats import codebook_set
from fp4dit_ao.formats.codebook_groups import BOOKS, LEVELS
from fp4dit_ao.kernels import codebook_dispatch
from fp4dit_ao.observers import CodebookWeightObserver
from fp4dit_ao.observers.activation import ActivationObserver
from fp4dit_ao.schemes.graph_patterns import is_buffer, is_call, tensor_of, token_wise_input, weight_path
from fp4dit_ao.schemes.grouped import activation_observer, canonical
from fp4dit_ao.schemes.scheme import Arrays, Description, LowBitLinear, ObserverSpec, PlainLinear
from fp4dit_ao.tensors.codebook import CodebookTensor


class CodebookGroupsScheme:
    """See ``QuantizationScheme``."""

    rules: SchemeRules = CODEBOOK_GROUPS
    one_format = False

    def quantizes_online(self, config: QuantConfig) -> bool:
        return config.activation_granularity == "token"

    def block_size(self, config: QuantConfig) -> list[int]:
        return [1, config.group_size]

    def weight_observer(self, config: QuantConfig) -> ObserverSpec[CodebookWeightObserver]:
        sets = config.weight_candidates or (str(config.weight),)
        arguments = {"fmt": sets, "group_size": config.group_size, "search": config.weight_search}
        return ObserverSpec(CodebookWeightObserver, arguments)

    def input_observer(self, config: QuantConfig, fmt: str) -> ObserverSpec[ActivationObserver]:
        candidates = config.activation_candidates
        return activation_observer(config, candidates if fmt in candidates else fmt)

    def attention_observer(self, config: QuantConfig, fmt: str) -> ObserverSpec[ActivationObserver]:
        return activation_observer(config, fmt)

    def empty_parts(self, shape: Sequence[int], config: QuantConfig) -> dict[str, Tensor]:
        rows, columns = shape
        groups = columns // config.group_size
        return {
            "qdata": torch.empty((rows, columns // 2), dtype=torch.uint8, device="meta"),
            "index": torch.empty((rows, (groups + 1) // 2), dtype=torch.uint8, device="meta"),
            "row_scale": torch.empty((rows,), dtype=torch.float32, device="meta"),
            "codebooks": torch.empty((BOOKS, LEVELS), dtype=torch.int8, device="meta"),
        }

    def from_parts(self, parts: Mapping[str, Tensor], config: QuantConfig, dtype: torch.dtype) -> Tensor:
        tensors = (parts["qdata"], parts["index"], parts["row_scale"], parts["codebooks"])
        return CodebookTensor(*tensors, config.group_size, str(config.weight), canonical(config.activation), dtype)

    @torch.no_grad()
    def round_to_nearest(self, name: str, weight: Tensor, config: QuantConfig) -> Tensor:
        observer = self.weight_observer(config).constructor(name=f"{name}.weight")()
        codes, row_scale = observer.quantized(weight.detach())
        assert observer.index is not None  # found with the codes
        books = observer.fmt.tensor(codes.device)
        act_fmt = canonical(config.activation)
        return CodebookTensor.from_codes(
            codes, observer.index, row_scale, books, str(observer.fmt), act_fmt, weight.dtype
        )

    def owns(self, weight: Tensor) -> bool:
        return isinstance(weight, CodebookTensor)

    def nearest_codes(self, weight: Tensor, original: Tensor) -> Tensor:
        assert isinstance(weight, CodebookTensor)
        return codebook_set(weight.fmt).encode(original.float() / weight.row_scale[:, None], weight.books)

    def lowered(self, model: GraphModule, linear: Node) -> LowBitLinear | None:
        dequantized = linear.args[1]
        if not is_call(dequantized, torch.ops.fp4dit_ao.codebook_dequantize.default):
            return None
        arguments: Arguments = dequantized.args
        *buffers, dtype, fmt = arguments
        if not all(is_buffer(buffer) for buffer in buffers):
            return None
        codes, index, books, row_scale = (tensor_of(model, buffer) for buffer in buffers)
        found = token_wise_input(linear.args[0])
        x = linear.args[0] if found is None else found.source
        assert isinstance(x, Node)
        act_fmt = None if found is None else found.fmt
        weight = CodebookTensor.from_codes(codes, index, row_scale, books, fmt, act_fmt, dtype)
        return LowBitLinear(x, weight, weight_path(buffers[0]))

    def plain_linear(self, weight: Tensor) -> PlainLinear:
        assert isinstance(weight, CodebookTensor)
        tensors = {name: getattr(weight, name) for name in CodebookTensor.tensor_data_names}
        return PlainLinear(codebook_dispatch.linear, tensors, (weight.group_size, weight.fmt, weight.act_fmt))

    def describe(self, config: QuantConfig) -> dict[str, object]:
        return {"weight": str(config.weight), "block_size": self.block_size(config)}

    def describe_format(self, config: QuantConfig) -> dict[str, object]:
        codebooks = codebook_set(str(config.weight))
        return {"bits": codebooks.bits, "codebooks": [list(book) for book in codebooks.books]}

    def input_scale(self, config: QuantConfig, attention: bool) -> str:
        return config.activation_granularity

    def dequantize(
        self, codes: NDArray[np.uint8], parts: Arrays, layer: Description, fmt: Description
    ) -> NDArray[np.float32]:
        group_size = layer["block_size"][1]
        groups = codes.shape[1] // group_size
        index = np.stack([parts["index"] & 15, parts["index"] >> 4], -1).reshape(codes.shape[0], -1)[:, :groups]
        levels = parts["codebooks"].astype(np.float32)[index.repeat(group_size, 1), codes]
        weight: NDArray[np.float32] = levels * parts["row_scale"].astype(np.float32)[:, None]
        return weight
