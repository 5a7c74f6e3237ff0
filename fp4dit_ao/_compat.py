"""The one place that touches private torch and torchao API. Tested in tests/test_compat.py against every version we claim."""

from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.utils import create_getattr_from_value


def create_buffer_node(model: GraphModule, name: str, value: Tensor) -> Node:
    """Register ``value`` as a buffer under a free name that starts with ``name``, and a ``get_attr`` node for it."""
    node = create_getattr_from_value(model, model.graph, name, value.detach(), value.device)
    assert isinstance(node, Node)
    return node
