"""``torchrun -m fp4dit_ao.cli quantize``: two processes save the bytes of one, though one of them is killed on the way."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from fp4dit_ao.cli.app import app
from tests.tiny import CALL, tiny_pipeline


@pytest.mark.timeout(1200)  # a minute on two idle cores
def test_two_processes_save_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_pipeline().save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "generation.json").write_text(json.dumps(CALL))
    (tmp_path / "prompts.txt").write_text("red cat\nblue dog\n\ngreen tree\n")
    command = ["quantize", str(tmp_path / "float"), "--recipe", "w4a6", "--prompts", str(tmp_path / "prompts.txt")]
    command += ["--iters", "40", "--samples", "4", "--out"]
    blocks = tmp_path / "two.unfinished" / "blocks"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--max-restarts", "1", "-m", "fp4dit_ao.cli"]
    with subprocess.Popen([*torchrun, *command, str(tmp_path / "two"), "--resume"], stdout=subprocess.PIPE) as process:
        while not (blocks / "block-000.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.05)
        ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
        ranks["1"].send_signal(signal.SIGKILL)
        assert process.wait() == 0
        assert process.stdout is not None
        said = process.stdout.read().decode()
    assert said.count("saved after") == 1, "the first process alone writes and speaks"
    assert {path.name for path in tmp_path.iterdir()} == {"float", "prompts.txt", "two"}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:  # in limited memory, which changes no byte either
        result = CliRunner().invoke(app, [*command, str(tmp_path / "one"), "--shards", "2", "--memory", "64GB"])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
    for name in files - {Path("reconstruction.md")}:  # which has seconds in it
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    rows = [path.read_text().splitlines()[2:4] for path in (tmp_path / x / "reconstruction.md" for x in ("one", "two"))]
    cells = [[row.split("|")[1:7] for row in table] for table in rows]
    assert cells[0] == cells[1]
    assert {row[5].strip() for row in cells[0]} == {"learned"}
