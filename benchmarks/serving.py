"""Throughput and tail latency of ``fp4dit-ao serve``: the reference pipeline, quantized and not, in turns, on loopback.

    python -m benchmarks.serving

Every server is a process of its own, started by the command that users type. A round sends requests to one server at a fixed
number of clients at once, each asking again as soon as it is answered; then it is the other server's turn.
"""

import base64
import hashlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx2
import typer
from tqdm import tqdm

from fp4dit_ao import models, quantize_pipeline, reference
from fp4dit_ao.environment import environment, one_line
from fp4dit_ao.evaluate import markdown_table, write_text

READY_SECONDS = 600
PERCENTILES = (50, 95, 99)


@contextmanager
def server(model: str, *options: str) -> Iterator[httpx2.Client]:
    """``fp4dit-ao serve model``, warmed up; it is told to end, and must do so well."""
    command = [sys.executable, "-c", "from fp4dit_ao.cli import main; main()", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said: list[str] = []
    try:
        address = None
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"listening on (http://\S+);", line):
                address = found[1]
                break
        if address is None:
            raise RuntimeError(f"the server of {model} did not start:\n{''.join(said)}")
        threading.Thread(target=said.extend, args=(process.stdout,), daemon=True).start()
        with httpx2.Client(base_url=address, timeout=READY_SECONDS) as client:
            end = time.monotonic() + READY_SECONDS
            while client.get("/health/ready").status_code != 200:
                if time.monotonic() > end or process.poll() is not None:
                    raise RuntimeError(f"the server of {model} did not become ready:\n{''.join(said)}")
                time.sleep(0.2)
            yield client
        process.terminate()
        if process.wait(READY_SECONDS) != 0:
            raise RuntimeError(f"the server of {model} did not end well:\n{''.join(said)}")
    finally:
        process.kill()
        process.wait()


def load(client: httpx2.Client, prompts: list[str], clients: int, steps: int, first: int) -> dict[str, Any]:
    """Every prompt once, from ``clients`` at once: seconds in all and of each request, and what was drawn.

    Raises:
        RuntimeError: a request failed.
    """

    def ask(index: int) -> tuple[float, str]:
        body = {"prompt": prompts[index], "seed": first + index, "steps": steps}
        began = time.perf_counter()
        answer = client.post("/v1/images/generations", json=body)
        took = time.perf_counter() - began
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {answer.text[:300]}")
        image = base64.b64decode(answer.json()["data"][0]["b64_json"])
        return took, hashlib.sha256(image).hexdigest()

    before = images_and_batches(client)
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    seconds = time.perf_counter() - began
    images, batches = (after - was for after, was in zip(images_and_batches(client), before, strict=True))
    return {
        "seconds": seconds, "latencies": [took for took, _ in answers], "images": [digest for _, digest in answers],
        "batch": images / batches,
    }  # fmt: skip


def images_and_batches(client: httpx2.Client) -> tuple[float, float]:
    """Images that were drawn so far, and batches, as the server's metrics say."""
    text = client.get("/metrics").text
    found = [re.search(rf"^fp4dit_batch_size_{name} (\S+)", text, re.MULTILINE) for name in ("sum", "count")]
    images, batches = (float(match[1]) if match else 0.0 for match in found)
    return images, batches


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def main(
    recipe: str = "w4a6_e2m1",
    clients: Annotated[str, typer.Option(help="Requests in flight at once, separated by commas.")] = "1,8",
    requests: Annotated[int, typer.Option(min=2, max=1000, help="Of one round.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Turns of each server.")] = 3,
    steps: Annotated[int, typer.Option(min=1, max=100)] = 10,
    max_batch: int = 8,
    compile: bool = True,
    out: Path = Path("benchmarks/results"),
) -> None:
    """Measure and print; writes ``serving.json``."""
    numbers = [int(text) for text in clients.split(",")]
    known = reference.prompts()
    pipe = models.open_pipeline(models.REFERENCE, "cpu")
    quantized = quantize_pipeline(pipe, recipe, prompts=known[:4], rounding="nearest", progress=False)
    results: dict[str, dict[int, list[dict[str, Any]]]] = {}
    options = ["--device", "cpu", "--max-batch", str(max_batch), "--compile" if compile else "--no-compile"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        quantized.save_pretrained(f"{folder}/quantized")
        servers = {}
        for name, model in {"unquantized": models.REFERENCE, recipe: f"{folder}/quantized"}.items():
            print(f"starting {name}", flush=True)
            servers[name] = stack.enter_context(server(model, *options))
            results[name] = {number: [] for number in numbers}
        turns = [(turn, number, name) for turn in range(rounds) for number in numbers for name in servers]
        for turn, number, name in tqdm(turns, desc="rounds"):
            prompts = [known[(turn * requests + i) % len(known)] for i in range(requests)]
            results[name][number].append(load(servers[name], prompts, number, steps, turn * requests))
    print(table(results))
    settings = {
        "recipe": recipe,
        "requests": requests,
        "rounds": rounds,
        "steps": steps,
        "max_batch": max_batch,
        "compile": compile,
    }
    print(
        f"\n{', '.join(f'{key} {value}' for key, value in settings.items())}; both servers on one machine. {one_line()}"
    )
    result = {"settings": settings, "environment": environment(), "results": results}
    write_text(out / "serving.json", json.dumps(result, indent=1) + "\n")


def table(results: dict[str, dict[int, list[dict[str, Any]]]]) -> str:
    """One row per server and number of clients; throughput also as a ratio of the first server's, turn by turn."""
    rows = []
    base = next(iter(results.values()))
    for name, by_number in results.items():
        for number, turns in by_number.items():
            latencies = [took for turn in turns for took in turn["latencies"]]
            rates = [len(turn["latencies"]) / turn["seconds"] for turn in turns]
            ratios = [b["seconds"] / own["seconds"] for b, own in zip(base[number], turns, strict=True)]
            rows.append(
                [name, str(number), f"{statistics.mean(turn['batch'] for turn in turns):.1f}",
                 f"{statistics.median(rates):.2f}",
                 f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                 *(f"{percentile(latencies, percent) * 1000:.0f}" for percent in PERCENTILES)]
            )  # fmt: skip
    head = ["", "clients", "images / batch", "images / s", "of the unquantized", *(f"p{p}, ms" for p in PERCENTILES)]
    return markdown_table(head, rows) + "\n\n" + same_bits(results)


def same_bits(results: dict[str, dict[int, list[dict[str, Any]]]]) -> str:
    """How many images had the same bits with another number of clients, that is in other batches."""
    parts = []
    for name, by_number in results.items():
        first, *others = ([digest for turn in turns for digest in turn["images"]] for turns in by_number.values())
        equal = sum(len({a, *rest}) == 1 for a, *rest in zip(first, *others, strict=True))
        parts.append(f"{name} {equal} of {len(first)}")
    return f"Images with the same bits whatever the number of clients: {', '.join(parts)}."


if __name__ == "__main__":
    typer.run(main)
