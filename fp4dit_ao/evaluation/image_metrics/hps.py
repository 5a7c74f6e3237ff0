"""HPSv2: which of two images of a prompt people would prefer."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fp4dit_ao.evaluation.image_metrics.metric import Floats, Images, PromptMetric
from fp4dit_ao.evaluation.image_metrics.open_clip import IMAGE_HEAD, TEXT_HEAD, read_open_clip
from fp4dit_ao.evaluation.image_metrics.pretrained import TextImageEncoder, array
from fp4dit_ao.evaluation.image_metrics.weight_files import weight_file

TOKENIZER = "openai/clip-vit-large-patch14"
"""Hub id of the tokenizer and the image processor: ViT-H-14 has those of every CLIP."""


class Hpsv2(PromptMetric):
    """100 times the cosine of image and prompt by the authors' ViT-H-14 (arXiv 2306.09341, section 4).

    ``weights`` is their file, such as ``HPS_v2.1_compressed.pt``, beside which a tokenizer may lie; or a folder or hub id
    of such weights as ``CLIPModel`` of transformers, PickScore's too.
    """

    label = "HPSv2"
    default_weights = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    digits = 2

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        super().__init__(weights, device)
        self.backbone = Path(self.weights).name.removesuffix(".pt")
        if self.weights.endswith((".pt", ".safetensors")):
            path = weight_file(self.weights, "download it, and give the file: --metric hpsv2=FILE")
            beside = (path.parent / "tokenizer_config.json").exists()
            model = read_open_clip(path, *self.heads())
            self.encoder = TextImageEncoder(str(path.parent) if beside else TOKENIZER, self.device, model)
        else:
            self.encoder = TextImageEncoder(self.weights, self.device)

    @staticmethod
    def heads() -> tuple[int, int]:
        """Widths of attention heads in the file's two halves."""
        return IMAGE_HEAD, TEXT_HEAD

    def score(self, images: Images, prompts: Sequence[str]) -> Floats:
        return array(100 * self.encoder.cosines(images, prompts))
