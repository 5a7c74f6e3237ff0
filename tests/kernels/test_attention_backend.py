"""The choice of an attention backend, with the CPU's two backends and made-up times in the place of a GPU's."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fp4dit_ao.kernels import attention, attention_backend
from fp4dit_ao.kernels.attention_backend import AttentionShape, fastest, preferred, seconds

CUDNN, FLASH, EFFICIENT = attention_backend.CANDIDATES
SHAPE = AttentionShape(torch.device("cpu"), torch.float32, (2, 3, 8, 64), 9, None)
FLASH_OP = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backend, "_FASTEST", {})


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SDPBackend]]:
    """A CPU that has a choice of its two backends, of which the plain one is said to be quicker; what was measured."""
    asked: list[SDPBackend] = []

    def measure(backend: SDPBackend, shape: AttentionShape) -> float:
        asked.append(backend)
        assert seconds(backend, shape) > 0
        return 1.0 if backend is SDPBackend.MATH else 2.0

    def only_the_first(backends, set_priority=False):  # type: ignore[no-untyped-def]
        return sdpa_kernel(backends[0] if set_priority else backends)

    real = attention_backend.fastest
    monkeypatch.setattr(attention_backend, "sdpa_kernel", only_the_first)  # CPUs know no priorities
    monkeypatch.setattr(attention_backend, "DEVICES", ("cpu",))
    monkeypatch.setattr(attention_backend, "CANDIDATES", (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH))
    monkeypatch.setattr(attention_backend, "fastest", lambda shape: real(shape, measure))
    yield asked


class Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[object] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def test_the_quickest_is_taken_and_remembered() -> None:
    asked: list[SDPBackend] = []

    def measure(backend: SDPBackend, shape: AttentionShape) -> float:
        asked.append(backend)
        if backend is CUDNN:
            raise RuntimeError("No available kernel")
        return {FLASH: 2.0, EFFICIENT: 1.0}[backend]

    assert fastest(SHAPE, measure) is EFFICIENT
    assert fastest(SHAPE, measure) is EFFICIENT
    assert asked == [CUDNN, FLASH, EFFICIENT]
    other = SHAPE._replace(keys=10)
    assert fastest(other, lambda backend, shape: float(backend is not CUDNN)) is CUDNN


def test_where_none_can_pytorch_chooses() -> None:
    def measure(backend: SDPBackend, shape: AttentionShape) -> float:
        raise RuntimeError("No available kernel")

    assert fastest(SHAPE, measure) is None


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest(SHAPE, lambda *_: 1.0) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert fastest(SHAPE, lambda *_: 1.0) is CUDNN


def test_a_backend_that_cannot_raises() -> None:
    with pytest.raises(RuntimeError):
        seconds(CUDNN, SHAPE)


@pytest.mark.parametrize("mask", [None, (1, 1, 8, 9)])
def test_attention_runs_on_it(on_cpu: list[SDPBackend], mask: tuple[int, ...] | None) -> None:
    q, k = torch.randn(2, 3, 8, 64), torch.randn(2, 3, 9, 64)
    bias = None if mask is None else torch.randn(mask)
    expected = F.scaled_dot_product_attention(q, k, k, bias)
    with Called() as before:
        F.scaled_dot_product_attention(q, k, k, bias)
    with Called() as called, preferred(q, k, bias):
        found = F.scaled_dot_product_attention(q, k, k, bias)
    assert torch.allclose(found, expected, atol=1e-5)
    assert FLASH_OP in before.seen and FLASH_OP not in called.seen
    assert on_cpu == [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    (shape,) = attention_backend._FASTEST
    assert shape == SHAPE._replace(mask=mask)


def test_it_is_measured_on_real_tensors_while_a_graph_is_compiled(
    on_cpu: list[SDPBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "kernels", dict)  # the compiled kernel for CPUs
    targets: list[object] = []

    def backend(graph, inputs):  # type: ignore[no-untyped-def]
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    from torch._dynamo.backends.common import aot_autograd

    def attend(q: Tensor, k: Tensor) -> Tensor:
        return torch.ops.fp4dit_ao.attention(q, k, k, None, None, "e2m3")

    q, k = torch.randn(2, 3, 8, 64), torch.randn(2, 3, 9, 64)
    with torch.no_grad():
        found = torch.compile(attend, backend=aot_autograd(fw_compiler=backend), fullgraph=True)(q, k)
        assert torch.allclose(found, attend(q, k), atol=1e-5)
    assert on_cpu[:2] == [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    assert targets and FLASH_OP.default not in targets


def test_the_others_follow_the_quickest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backend, "DEVICES", ("cpu",))
    monkeypatch.setattr(attention_backend, "fastest", lambda shape: FLASH)
    q = torch.randn(2, 3, 8, 64)
    with preferred(q, q, None):
        order = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
    assert order[:4] == [FLASH, CUDNN, EFFICIENT, SDPBackend.MATH]


def test_cpus_have_no_choice() -> None:
    q = torch.randn(2, 3, 8, 64)
    with Called() as called, preferred(q, q, None):
        F.scaled_dot_product_attention(q, q, q)
    assert FLASH_OP in called.seen
    assert not attention_backend._FASTEST
