"""``fp4dit-ao export``: a quantized transformer as one file."""

import time
from pathlib import Path

from fp4dit_ao.checkpoint import transformer_folder
from fp4dit_ao.checkpoint.single_file import export_single_file
from fp4dit_ao.deploy.exported_transformer import save_package, save_program
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.diffusers_integration.graph_form import load_graph


def export(model: str, out: Path, aoti: bool, device: str | None) -> None:
    """Load the transformer of ``model``, on ``device``, and write it to ``out``, in the form that its name ends in.

    Raises:
        ValueError: no quantized transformer, or ``aoti`` of a file that is no ``.pt2``.
    """
    if out.suffix == ".safetensors" and not aoti:
        export_single_file(find_transformer(model), out)
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
        return
    transformer = load_graph(find_transformer(model)).to(device or named_models.default_device())
    began = time.perf_counter()
    print("compiling; this takes minutes for a large model" if aoti else "exporting", flush=True)
    (save_package if aoti else save_program)(transformer, out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - began:.0f} s")


def find_transformer(model: str) -> Path:
    """The folder of the quantized transformer in a pipeline's folder, or ``model`` itself if it is one.

    Raises:
        ValueError: there is none.
    """
    path = Path(model).expanduser()
    found = next((folder for folder in (path / "transformer", path) if transformer_folder.is_quantized(folder)), None)
    if found is None:
        raise ValueError(f"{model} holds no quantized transformer; make one with: fp4dit-ao quantize MODEL --out DIR")
    return found
