"""Principal components: what they are, the graph, the function that stays, errors that fall. (Files: test_adaptive_rotation)"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4dit_ao import capture, transform
from fp4dit_ao.config import RECIPES
from fp4dit_ao.passes.transforms.principal_components import PrincipalComponents, principal_components
from tests.graphs import show
from tests.passes.transforms.layers import Layer, quantized, relative

INT4 = replace(RECIPES["int_w4a4"](), skip=())


def directed(seed: int = 0) -> tuple[Layer, list[dict[str, Tensor]]]:
    """Inputs most of whose energy lies in six directions across all channels."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(128, 6, generator=generator)).Q.T
    samples = [
        {
            "x": torch.randn(2, 48, 128, generator=generator)
            + 40 * torch.randn(2, 48, 6, generator=generator) @ directions
        }
        for _ in range(2)
    ]
    return Layer().eval(), samples


def test_components_are_right_singular_vectors() -> None:
    rows = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)
    found = principal_components(rows, 4).double().numpy()
    right = np.linalg.svd(rows.double().numpy())[2][:4].T
    np.testing.assert_allclose(np.abs((found * right).sum(0)), 1, rtol=1e-6)
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-6)


@torch.no_grad()
def test_linears_that_share_an_input_share_its_components() -> None:
    model, samples = directed()
    weight = model.one.weight.clone()
    method = PrincipalComponents()
    graph = transform(capture(model, samples[0]), samples[:1], [method], INT4, progress=False)
    assert [line for line in show(graph).splitlines() if not line.endswith(".bias")] == [
        "one_weight = self.one.weight",
        "two_weight = self.two.weight",
        "one_low_rank_down = self.one.low_rank_down",
        "matmul_default = matmul(x, one_low_rank_down)",
        "t_default = t(one_low_rank_down)",
        "matmul_default_1 = matmul(matmul_default, t_default)",
        "sub_tensor = sub.Tensor(x, matmul_default_1)",
        "linear = linear(sub_tensor, one_weight, one_bias)",
        "one_low_rank_up = self.one.low_rank_up",
        "matmul_default_2 = matmul(matmul_default, one_low_rank_up)",
        "add_tensor = add.Tensor(linear, matmul_default_2)",
        "linear_1 = linear(sub_tensor, two_weight, two_bias)",
        "two_low_rank_up = self.two.low_rank_up",
        "matmul_default_3 = matmul(matmul_default, two_low_rank_up)",
        "add_tensor_1 = add.Tensor(linear_1, matmul_default_3)",
        "sub = sub.Tensor(add_tensor, add_tensor_1)",
        "return (sub,)",
    ]
    assert graph.get_buffer("one.low_rank_down").shape == (128, 16), "an eighth of the channels"
    assert torch.equal(model.one.weight, weight), "the model that was captured stays as it is"
    assert relative(graph(**samples[1]), model(**samples[1])) < 4e-6
    u = graph.get_buffer("one.low_rank_down").numpy()
    np.testing.assert_allclose(graph.get_buffer("one.low_rank_up").T.numpy(), weight.numpy() @ u, atol=1e-5)
    np.testing.assert_allclose(
        graph.get_parameter("one.weight").numpy(), weight.numpy() @ (np.eye(128) - u @ u.T), atol=1e-5
    )
    fresh = capture(model, samples[0])
    PrincipalComponents.from_record(method.to_record()).apply(fresh)
    assert torch.equal(fresh(**samples[1]), model(**samples[1])), "changes nothing, until the stored components come"
    assert set(method.refused_loras()) == {"one", "two"}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("recipe", "factor"),
    [("int_w4a4", 3), ("w4a4", 3), ("w4a4_codebook", 3), ("nvfp4", 1.8), ("mxfp4", 1.8), ("w4a6_static", 1.3)],
)
@torch.no_grad()
def test_inputs_with_few_strong_directions_err_less(recipe: str, factor: float, seed: int) -> None:
    """Judged on other inputs than fitted to, and with a rotation of the rest as in the paper."""
    model, samples = directed(seed)
    config = replace(RECIPES[recipe](), skip=())
    expected, errors = model(**samples[1]), []
    for transforms in ([], ["principal_components"], ["principal_components", "hadamard"]):
        graph = transform(capture(model, samples[0]), samples[:1], transforms, config, progress=False)
        errors.append(relative(quantized(graph, config, samples[0])(**samples[1]), expected))
    assert max(errors[1:]) < errors[0] / factor


def test_refusals() -> None:
    for wrong in ({"fraction": 0}, {"fraction": 1}, {"rows": 0}):
        with pytest.raises(ValueError, match=r"it must be (more than 0 and less than 1|at least 1)"):
            PrincipalComponents(**wrong)
    model, samples = directed()
    graph = transform(capture(model, samples[0]), samples[:1], ["principal_components"], INT4, progress=False)
    with pytest.raises(ValueError, match=r"it has one\.low_rank_down; apply low_rank once"):
        transform(graph, samples, ["low_rank"], INT4, progress=False)
