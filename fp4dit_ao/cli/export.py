"""``fp4dit-ao export``: writes a quantized transformer as one file."""

import time
from pathlib import Path

from fp4dit_ao.checkpoint import transformer_folder
from fp4dit_ao.checkpoint.single_file import export_single_file
from fp4dit_ao.deploy.exported_transformer import save_package, save_program
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.diffusers_integration.graph_form import load_graph


def export(model: str, out: Path, aoti: bool, device: str | None) -> None:
    """Loads the transformer of ``model`` to ``device`` and writes it to ``out``; the suffix decides the kind of file.

    Raises:
        ValueError: ``model`` has no quantized transformer, or ``aoti`` is asked for and ``out`` is not a ``.pt2``.
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
    """Folder of the quantized transformer: ``model`` itself, or its subfolder ``transformer``.

    Raises:
        ValueError: neither holds a quantized transformer.
    """
    path = Path(model).expanduser()
    found = next((folder for folder in (path / "transformer", path) if transformer_folder.is_quantized(folder)), None)
    if found is None:
        raise ValueError(f"{model} holds no quantized transformer; make one with: fp4dit-ao quantize MODEL --out DIR")
    return found
