"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; the GPU if there is one.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; the pipeline's own number if not given.")]
Prompts = Annotated[Path | None, typer.Option(help="Text file, one prompt a line; may be left out for 'reference'.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Type of what is not quantized: 'float32', 'bfloat16', 'float16', or 'stored', as in MODEL's files."
    ),
]
Call = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=VALUE of the pipeline's call, such as height=512, guidance_scale=3 or negative_prompt=blurry; repeatable."
    ),
]
Compile = Annotated[bool, typer.Option(help="Run the quantized model under torch.compile.")]
Weights = Annotated[
    str,
    typer.Option(
        help="Form of a quantized MODEL's weights: 'packed'; one byte each as 'int8' or 'fp8': twice the memory, faster; "
        "'auto': bfloat16 where that is faster here, in a model that runs in bfloat16."
    ),
]
