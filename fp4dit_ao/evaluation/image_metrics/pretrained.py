"""Networks that judge images, from transformers: by folder or hub id, from this machine first."""

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from fp4dit_ao.evaluation.image_metrics.metric import Images

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

Loaded = TypeVar("Loaded")


def offline_first(load: Callable[..., Loaded], name: str, **options: object) -> Loaded:
    """``load(name)`` from a folder or from what is cached of a hub id; from the hub only if neither is there.

    Args:
        load: a ``from_pretrained`` of transformers.
        name: folder or hub id.
        **options: passed on.

    Raises:
        OSError: the weights are not here and cannot be fetched; the message says how to give a folder.
    """
    folder = Path(name).expanduser()
    try:
        return load(str(folder) if folder.is_dir() else name, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        local = error
    if not folder.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        try:
            return load(name, **options)
        except (OSError, ValueError) as error:
            local = error
    first = next((line for line in str(local).splitlines() if line.strip()), type(local).__name__)
    raise OSError(
        f"the weights {name} are neither a folder of a transformers model nor to be had from the hub ({first}); "
        "download them, and give their folder: --metric NAME=FOLDER"
    ) from local


def image_processor(name: str) -> "BaseImageProcessor":
    """Image processor of the model ``name`` that resizes with Pillow, so that numbers do not depend on torchvision."""
    from transformers import AutoImageProcessor

    new = int(metadata.version("transformers").partition(".")[0]) >= 5
    options: dict[str, object] = {"backend": "pil"} if new else {"use_fast": False}
    return offline_first(AutoImageProcessor.from_pretrained, name, **options)


def clip_image_processor(side: int) -> "BaseImageProcessor":
    """CLIP's image processor with Pillow: the shorter side to ``side`` pixels, bicubic, and the square in the middle."""
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


class ImageEncoder:
    """Features of images by any image model of transformers, such as DINOv2 or the image half of CLIP.

    Args:
        name: folder or hub id.
        device: where it runs.
        model: the network, if it is not to be read from there.
    """

    def __init__(self, name: str, device: torch.device, model: "PreTrainedModel | None" = None):
        from transformers import AutoModel

        self.device = device
        self.processor = image_processor(name)
        found = offline_first(AutoModel.from_pretrained, name) if model is None else model
        self.model: PreTrainedModel = found.eval().to(device)

    def pixels(self, images: Images) -> Tensor:
        """The model's input of images uint8 ``(n, h, w, 3)``."""
        pixels: Tensor = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels.to(self.device)

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        """Features float32 ``(n, width)``: CLIP's image embedding, a transformer's class token, or else what is pooled."""
        if hasattr(self.model, "get_image_features"):
            found = self.model.get_image_features(pixel_values=self.pixels(images))
            features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
        else:
            output = self.model(pixel_values=self.pixels(images))
            hidden: Tensor = output.last_hidden_state
            features = hidden[:, 0] if hidden.ndim == 3 else output.pooler_output.flatten(1)
        return features.float()


class TextImageEncoder(ImageEncoder):
    """Both halves of a CLIP model; arguments as those of :class:`ImageEncoder`."""

    def __init__(self, name: str, device: torch.device, model: "PreTrainedModel | None" = None):
        from transformers import AutoTokenizer

        super().__init__(name, device, model)
        self.tokenizer: PreTrainedTokenizerBase = offline_first(AutoTokenizer.from_pretrained, name)

    @torch.no_grad()
    def cosines(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Cosine similarity of each image with its prompt, float32 ``(n,)``; long prompts are cut where CLIP cuts them."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.device)
        output = self.model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=self.pixels(images)
        )
        return torch.nn.functional.cosine_similarity(output.image_embeds.float(), output.text_embeds.float())


def array(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """A tensor as float64 array."""
    found: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = values.double().cpu().numpy()
    return found
