"""Entry in transformers' tables of quantizers: a refusal that says how text encoders are quantized and loaded.

Diffusers looks here, too: ``PipelineQuantizationConfig(quant_backend="fp4dit_ao", …)`` wants a config of the same signature
from both libraries. Nothing is imported from diffusers, which may be importing transformers at this moment.
"""

from typing import NoReturn

from transformers.quantizers import auto

from fp4dit_ao._registration import METHOD

MESSAGE = (
    "transformers can neither quantize text encoders with fp4dit_ao nor load quantized ones: call "
    "quantize_pipeline(pipe, components=['transformer', 'text_encoder']) and load_pipeline(folder), and let a "
    "PipelineQuantizationConfig quantize no text encoder, as with components_to_quantize=['transformer']"
)


class RefusedConfig:
    """Stands for ``FP4DiTConfig`` in transformers; the arguments are the same.

    Raises:
        ValueError: always.
    """

    def __init__(self, recipe: object = None, skip: object = (), sample: object = None, transforms: object = ()):
        raise ValueError(MESSAGE)

    @classmethod
    def from_dict(cls, *args: object, **kwargs: object) -> NoReturn:
        """Refuses the config of a text encoder that was saved.

        Raises:
            ValueError: always.
        """
        raise ValueError(MESSAGE)


def refused_quantizer(*args: object, **kwargs: object) -> NoReturn:
    """Refuses to quantize a text encoder, by the config that was given to transformers.

    Raises:
        ValueError: always.
    """
    raise ValueError(MESSAGE)


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = RefusedConfig
auto.AUTO_QUANTIZER_MAPPING[METHOD] = refused_quantizer
