"""HPSv2 and ImageReward: random weights under the authors' names, through transformers' classes, against plain PyTorch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp4dit_ao.evaluation.image_metrics import image_reward
from fp4dit_ao.evaluation.image_metrics.hps import Hpsv2
from fp4dit_ao.evaluation.image_metrics.image_reward import ImageReward
from tests.evaluation.tiny_judges import SIDE, WORDS, tiny_clip

RANDOM = np.random.default_rng(0)
PROMPTS = ["a red cat", "tree"]
WIDTH = 64
IMAGES = RANDOM.integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)  # of the networks' size: nothing is resized
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pixels() -> Tensor:
    return ((torch.from_numpy(IMAGES).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def ids(length: int, end: int) -> Tensor:
    """Tokens of the prompts as the tiny tokenizer numbers them, by hand."""
    rows = [[0, *(3 + WORDS.index(word) for word in prompt.split()), 1] for prompt in PROMPTS]
    return torch.tensor([row + [end] * (length - len(row)) for row in rows])


# --- HPSv2: open_clip's modules, written down again -------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, WIDTH, 8, 8, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.visual.positional_embedding = nn.Parameter(torch.randn(17, WIDTH))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.visual.proj = nn.Parameter(torch.randn(WIDTH, 24))
        self.visual.transformer = nn.Module()
        self.visual.transformer.resblocks = nn.ModuleList([Block(WIDTH, 2), Block(WIDTH, 2)])
        self.token_embedding = nn.Embedding(3 + len(WORDS), WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(16, WIDTH))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([Block(WIDTH, 4), Block(WIDTH, 4)])
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, 24))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def cosines(self, images: Tensor, tokens: Tensor) -> Tensor:
        x = self.visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        x = self.visual.ln_pre(x)
        for block in self.visual.transformer.resblocks:
            x = block(x)
        image = self.visual.ln_post(x[:, 0]) @ self.visual.proj
        y = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((16, 16), -torch.inf).triu(1)
        for block in self.transformer.resblocks:
            y = block(y, mask)
        y = self.ln_final(y)
        text = y[torch.arange(len(y)), tokens.argmax(-1)] @ self.text_projection
        return F.cosine_similarity(image, text)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("weights") / "tiny-clip")


def test_hpsv2_is_open_clip(clip_folder, monkeypatch) -> None:
    torch.manual_seed(0)
    network = OpenClip().eval()
    file = clip_folder / "HPS_tiny.pt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, file)
    monkeypatch.setattr(Hpsv2, "heads", staticmethod(lambda: (WIDTH // 2, WIDTH // 4)))
    with torch.no_grad():
        wanted = 100 * network.cosines(pixels(), ids(16, end=1))
    metric = Hpsv2(str(file))
    assert metric.title == "HPSv2 (HPS_tiny)"
    assert metric.score(IMAGES, PROMPTS) == pytest.approx(wanted.tolist(), abs=2e-3)


def test_hpsv2_takes_a_folder_of_transformers_too(clip_folder) -> None:
    assert Hpsv2(str(clip_folder)).score(IMAGES, PROMPTS).shape == (2,)


@pytest.mark.parametrize(("metric", "word"), [(Hpsv2, "open_clip"), (ImageReward, "ImageReward")])
def test_other_weights_are_refused(metric, word, tmp_path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"holds no weights of {word}"):
        metric(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("metric", [Hpsv2, ImageReward])
def test_missing_weights_are_said_with_the_remedy(metric, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match=r"are not here .*--metric \w+=FILE"):
        metric("owner/no-such/file.pt")


# --- ImageReward: BLIP, written down again from its papers -------------------------------------------------------------


def reward_weights() -> dict[str, Tensor]:
    torch.manual_seed(1)
    found = {
        "blip.visual_encoder.cls_token": torch.randn(1, 1, WIDTH), "blip.visual_encoder.pos_embed": torch.randn(1, 17, WIDTH),
        "blip.text_encoder.embeddings.word_embeddings.weight": torch.randn(3 + len(WORDS), WIDTH),
        "blip.text_encoder.embeddings.position_embeddings.weight": torch.randn(40, WIDTH),
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
    }  # fmt: skip

    def linear(name: str, width: int, into: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = torch.randn(into, width) / math.sqrt(width), torch.randn(into)

    def norm(name: str) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = 1 + torch.randn(WIDTH) / 4, torch.randn(WIDTH) / 4

    found["blip.visual_encoder.patch_embed.proj.weight"] = torch.randn(WIDTH, 3, 8, 8) / 14
    found["blip.visual_encoder.patch_embed.proj.bias"] = torch.randn(WIDTH)
    norm("blip.visual_encoder.norm")
    norm("blip.text_encoder.embeddings.LayerNorm")
    for layer in range(2):
        block = f"blip.visual_encoder.blocks.{layer}"
        norm(f"{block}.norm1"), norm(f"{block}.norm2")
        linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH), linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", WIDTH, 96), linear(f"{block}.mlp.fc2", 96, WIDTH)
        text = f"blip.text_encoder.encoder.layer.{layer}"
        for kind in ("attention", "crossattention"):
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                linear(f"{text}.{kind}.{part}", WIDTH, WIDTH)
            norm(f"{text}.{kind}.output.LayerNorm")
        linear(f"{text}.intermediate.dense", WIDTH, 96), linear(f"{text}.output.dense", 96, WIDTH)
        norm(f"{text}.output.LayerNorm")
    for place, (width, into) in {0: (WIDTH, 16), 2: (16, 8), 4: (8, 8), 6: (8, 4), 7: (4, 1)}.items():
        linear(f"mlp.layers.{place}", width, into)
    return found


def reward(w: dict[str, Tensor], images: Tensor, tokens: Tensor) -> Tensor:
    """One head a layer (of 64), as the weights above are read."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * w[
            f"{name}.weight"
        ] + w[f"{name}.bias"]

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        scores = q @ k.transpose(1, 2) / math.sqrt(WIDTH)
        return (scores if seen is None else scores.masked_fill(~seen[:, None], -torch.inf)).softmax(-1) @ v

    name = "blip.visual_encoder"
    x = F.conv2d(images, w[f"{name}.patch_embed.proj.weight"], w[f"{name}.patch_embed.proj.bias"], 8)
    x = (
        torch.cat([w[f"{name}.cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
        + w[f"{name}.pos_embed"]
    )
    for layer in range(2):
        block = f"{name}.blocks.{layer}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    x = norm(f"{name}.norm", x, 1e-6)
    name = "blip.text_encoder"
    real = tokens >= 0
    tokens = tokens.clamp(min=0)
    y = w[f"{name}.embeddings.word_embeddings.weight"][tokens]
    y = y + w[f"{name}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    y = norm(f"{name}.embeddings.LayerNorm", y, 1e-12)
    for layer in range(2):
        for kind, other, seen in (("attention", None, real), ("crossattention", x, None)):
            part = f"{name}.encoder.layer.{layer}.{kind}"
            source = y if other is None else other
            q, k, v = (linear(f"{part}.self.{p}", s) for p, s in (("query", y), ("key", source), ("value", source)))
            mixed = linear(f"{part}.output.dense", attend(q, k, v, seen))
            y = norm(f"{part}.output.LayerNorm", y + mixed, 1e-12)
        block = f"{name}.encoder.layer.{layer}"
        inner = linear(f"{block}.output.dense", F.gelu(linear(f"{block}.intermediate.dense", y)))
        y = norm(f"{block}.output.LayerNorm", y + inner, 1e-12)
    z = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        z = linear(f"mlp.layers.{place}", z)
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_its_architecture(clip_folder) -> None:
    weights = reward_weights()
    file = clip_folder / "ImageReward.pt"
    torch.save(weights, file)
    wanted = reward(weights, pixels(), ids(image_reward.LONGEST, end=-1))
    metric = ImageReward(str(file))
    assert metric.title == "ImageReward"
    found = metric.score(IMAGES, PROMPTS)
    assert found == pytest.approx(wanted.tolist(), abs=1e-4)
    assert abs(found[0] - found[1]) > 1e-3


def test_a_file_that_lacks_a_tensor_is_refused(clip_folder) -> None:
    weights = reward_weights()
    del weights["blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    torch.save(weights, clip_folder / "short.pt")
    with pytest.raises(
        ValueError, match=r"no tensor for encoder.layer.1.crossattention.self.key.weight of shape \(64, 64\)"
    ):
        ImageReward(str(clip_folder / "short.pt"))
