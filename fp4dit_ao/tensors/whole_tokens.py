"""``WholeTokens``: row-wise tensor parallelism whose result is that of one process, with quantized input, too.

Where a linear is split over its inputs, a process has a part of each token. Quantized with a scale of its own, as
``RowwiseParallel`` does it, that part is finer than in the whole token, and the result another. Here processes first exchange
the largest magnitude of each token. It takes the place of some more inputs, whose weights are zero: so it sets the token's
scale, adds nothing to the product, and every kernel computes what it always does. Products of parts are added up in the
output's type: results differ by the order of those sums.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import RowwiseParallel

from fp4dit_ao.formats import parse
from fp4dit_ao.tensors.codebook import CodebookTensor
from fp4dit_ao.tensors.minifloat import MinifloatTensor
from fp4dit_ao.tensors.quantized_weight import QuantizedWeight

LEAST = 16
"""Fewest columns that are added to a part: kernels take columns by 16."""


class WholeTokens(RowwiseParallel):
    """``RowwiseParallel`` for linears with quantized weights, in plans of ``parallelize_module``.

    The linear's input is a process's part of each token: what ``ColwiseParallel`` puts out.

    Raises:
        ValueError: inputs that do not divide evenly into parts of whole groups, or codebooks without a zero.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight = module.weight
        if isinstance(weight, QuantizedWeight) and getattr(weight, "act_fmt", None) is not None:
            whole, added = widened(weight, device_mesh.size())
            module.weight = nn.Parameter(whole, requires_grad=False)
            group = device_mesh.get_group()

            def with_maximum(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                x = args[0].to_local() if isinstance(args[0], DTensor) else args[0]
                largest = x.abs().amax(-1, keepdim=True)
                dist.all_reduce(largest, dist.ReduceOp.MAX, group)
                return (torch.cat([x, largest.expand(*x.shape[:-1], added)], -1), *args[1:])

            module = super()._apply(module, device_mesh)
            module.register_forward_pre_hook(with_maximum, prepend=True)
            return module
        return super()._apply(module, device_mesh)


def widened(weight: QuantizedWeight, parts: int) -> tuple[QuantizedWeight, int]:
    """The weight with columns of zeros behind each of ``parts`` equal parts, and the number of columns per part.

    Raises:
        ValueError: see :class:`WholeTokens`.
    """
    columns = weight.stored_shape[1]
    zeros = _bytes_of_zero(weight)
    shared = {name for name, tile in weight.tiles().items() if tile is None or not 0 < tile[1] < columns}
    tiles = {name: tile[1] for name, tile in weight.tiles().items() if tile is not None and name not in shared}
    added = max(LEAST, *tiles.values())
    if columns % parts or any(columns // parts % tile for tile in tiles.values()):
        weight.refuse(
            f"its {columns} columns are no {parts} equal parts of whole groups ({max(tiles.values())} columns)"
        )
    wide: dict[str, object] = {}
    for name, tile in tiles.items():
        x: Tensor = getattr(weight, name)
        new = x[:, : added // tile].clone()  # scales of zeros may be any
        if name in zeros:
            new.view(torch.uint8).fill_(zeros[name])
        wide[name] = torch.cat([y for part in x.chunk(parts, 1) for y in (part, new)], 1)
    if hasattr(weight, "block_size") and weight.block_size[1] == columns:
        wide["block_size"] = [weight.block_size[0], -1]
    return weight.with_parts(**wide), added


def _bytes_of_zero(weight: QuantizedWeight) -> dict[str, int]:
    """The byte of each stored tensor with which a weight is zero."""
    if isinstance(weight, MinifloatTensor):
        fmt = parse(weight.fmt)
        code = int(fmt.encode(torch.zeros(1)))
        return {"qdata": 17 * code if fmt.bits <= 4 else code}
    if not isinstance(weight, CodebookTensor):
        return {"qdata": 0}
    found = (weight.codebooks == 0).nonzero().tolist()
    if not found:
        weight.refuse("no codebook has a zero, which row-wise tensor parallelism of quantized tokens adds")
    book, code = found[0]
    return {"index": 17 * book, "qdata": 17 * code}  # the same code in both halves
