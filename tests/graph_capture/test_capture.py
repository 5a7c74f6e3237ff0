"""One captured graph serves every batch, image size and text length, exactly, and is called as the module was."""

import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from fp4dit_ao import capture
from fp4dit_ao.graph_capture import capturing
from tests.graphs import TinyDiT, tiny_sample


@pytest.fixture(scope="module")
def pixart():
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=32, sample_size=16, patch_size=2, caption_channels=24, use_additional_conditions=False,
    ).eval()  # fmt: skip


def pixart_sample(batch: int = 2, height: int = 16, width: int = 16, tokens: int = 7) -> dict:
    generator = torch.Generator().manual_seed(batch + height + width + tokens)
    mask = (torch.rand(batch, tokens, generator=generator) > 0.3).long()
    mask[:, 0] = 1
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, tokens, 24, generator=generator),
        "timestep": torch.tensor([7]).expand(batch),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["captured at batch 1", "captured at batch 2"])
def graph(request, pixart):
    return capture(pixart, pixart_sample(request.param))


@pytest.mark.parametrize(
    "shape", [(2, 16, 16, 7), (1, 16, 16, 7), (3, 12, 20, 7), (1, 8, 8, 1), (2, 4, 32, 16), (4, 32, 32, 300)]
)
def test_exact_at_every_size(pixart, graph, shape) -> None:
    sample = pixart_sample(*shape)
    with torch.no_grad():
        assert torch.equal(graph(**sample)[0], pixart(**sample)[0])


def test_an_empty_mask_is_exact_too(pixart, graph) -> None:
    sample = pixart_sample() | {"encoder_attention_mask": torch.zeros(2, 7, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(graph(**sample)[0], pixart(**sample)[0])


def test_called_as_the_module(pixart, graph) -> None:
    sample = pixart_sample()
    hidden = sample.pop("hidden_states")
    del sample["return_dict"]
    with torch.no_grad():
        assert torch.equal(graph(hidden, **sample)[0], pixart(hidden, **sample, return_dict=False)[0])
    names = list(inspect.signature(pixart.forward).parameters)
    assert list(inspect.signature(graph.forward).parameters) == names


def test_the_model_is_left_as_it_was(pixart) -> None:
    height = pixart.pos_embed.height
    capture(pixart, pixart_sample())
    assert pixart.pos_embed.height == height


def test_nothing_pins_the_graph_to_the_example(graph) -> None:
    assert not [node for node in graph.graph.nodes if "assert" in str(node.target) or "guard" in str(node.target)]


def test_a_wrong_sample_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"TinyDiT\.forward: unknown latents; missing hidden_states"):
        capture(TinyDiT(), {"latents": torch.zeros(1), "shift": torch.zeros(1)})


def test_half_precision_and_non_contiguous_samples() -> None:
    model = TinyDiT().to(torch.bfloat16)
    sample = {k: v.to(torch.bfloat16) for k, v in tiny_sample().items()}
    sample["hidden_states"] = sample["hidden_states"].transpose(0, 1).contiguous().transpose(0, 1)
    graph = capture(model, sample)
    with torch.no_grad():
        assert torch.equal(graph(**sample)[0], model(**sample)[0])


def test_a_module_without_defaults() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x) + y

    model, x = Plain(), torch.randn(2, 4)
    graph = capture(model, {"x": x, "y": x})
    assert torch.equal(graph(x, x), model(x, x))
    assert torch.equal(graph(torch.ones(5, 4), y=torch.ones(5, 4)), model(torch.ones(5, 4), torch.ones(5, 4)))


class DataDependent(TinyDiT):
    """Takes as many tokens as a tensor says."""

    def forward(self, hidden_states: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor]:
        tokens = int(shift.sum())
        return super().forward(hidden_states[:, :tokens] if tokens > 3 else hidden_states, shift)


class LogarithmOfTokens(torch.nn.Module):
    """Scales by the logarithm of the number of places, which a graph can only hold for one number of them."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        height, width = hidden_states.shape[2:]
        return (hidden_states.flatten(2) * math.log(height * width),)


class TokensInTwos(torch.nn.Module):
    """Needs even sides and as many channels as its weight has, which are no numbers that a graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(16, 8)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        batch, channels, height, width = hidden_states.shape
        x = hidden_states.view(batch, channels, height // 2, 2, width // 2, 2)
        return (self.fc(x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 16)),)


def test_a_number_made_of_sizes_is_not_silently_kept() -> None:
    text = r"^LogarithmOfTokens computes a number .* == 24\): use it at this size alone"
    with pytest.warns(UserWarning, match=text) as warned:
        capture(LogarithmOfTokens(), {"hidden_states": torch.randn(2, 3, 4, 6)})
    assert warned[0].filename == __file__
    model = TokensInTwos()
    graph = capture(model, {"hidden_states": torch.randn(2, 4, 6, 8)})
    other = torch.randn(3, 4, 10, 4)
    assert torch.equal(graph(other)[0], model(other)[0])


def test_a_model_that_cannot_be_captured_gets_a_remedy() -> None:
    model = DataDependent()
    with pytest.raises(
        ValueError, match=r"^DataDependent cannot be captured as a graph \(.+\); see whether torch\.export can"
    ):
        capture(model, tiny_sample())
    model.config = {}  # as models of diffusers have, which the module form takes
    with pytest.raises(ValueError, match=r"^DataDependent cannot be captured as a graph \(.+\); use the module form"):
        capture(model, tiny_sample())


def test_tables_beside_the_buffers_are_where_the_parameters_are_while_a_graph_is_made() -> None:
    model, table = nn.Linear(2, 2, device="meta"), torch.ones(3)
    model.table, model.tables = table, [table, table]
    with capturing._tables_placed(model):
        assert {x.device.type for x in (model.table, *model.tables)} == {"meta"}
    assert model.table is table and model.tables[1] is table
