"""Throughput and tail latency of ``fp4dit-ao serve``, with the reference pipeline quantized and not, on loopback.

    python -m benchmarks.serving

Every server is a process started by the command that users type. In a round, a fixed number of clients send requests to
one server, each again as soon as it is answered; then the other server has its turn. The order alternates.
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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx2
import typer
from tqdm import tqdm

from fp4dit_ao import quantize_pipeline, reference
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.evaluation.environment import environment, one_line
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table

READY_SECONDS = 3600
"""Time limit of warming up, in seconds; compiling takes a minute on two idle cores, and many on busy ones."""
PERCENTILES = (50, 95, 99)
Results = dict[str, dict[int, list[dict[str, Any]]]]
"""Measurements of each round, by name of the server, then by number of clients."""


@contextmanager
def server(model: str, *options: str) -> Iterator[httpx2.Client]:
    """Runs ``fp4dit-ao serve model``, and yields a client of it, perhaps while it still warms up; ends it afterwards.

    Raises:
        RuntimeError: the server did not start, or did not end with exit status 0.
    """
    command = [
        sys.executable,
        "-c",
        "from fp4dit_ao.cli.app import main; main()",
        "serve",
        model,
        "--port",
        "0",
        *options,
    ]
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
            yield client
        process.terminate()
        if process.wait(READY_SECONDS) != 0:
            raise RuntimeError(f"the server of {model} did not end well:\n{''.join(said)}")
    finally:
        process.kill()
        process.wait()


def wait_until_ready(client: httpx2.Client) -> None:
    """Waits until the server of ``client`` has warmed up.

    Raises:
        RuntimeError: the warm-up failed, or took longer than :data:`READY_SECONDS`.
    """
    end = time.monotonic() + READY_SECONDS
    while client.get("/health/ready").status_code != 200:
        live = client.get("/health/live")
        if live.status_code != 200 or time.monotonic() > end:
            raise RuntimeError(f"a server did not become ready: {live.text[:300]}")
        time.sleep(0.2)


def load(client: httpx2.Client, prompts: Sequence[str], clients: int, steps: int, first: int) -> dict[str, Any]:
    """Requests every prompt once, by ``clients`` at once; returns total and single seconds, digests and batch sizes.

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

    before = batches(client)
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds, "latencies": [took for took, _ in answers], "images": [digest for _, digest in answers],
        "batches": {size: count - before.get(size, 0) for size, count in batches(client).items()},
    }  # fmt: skip


def batches(client: httpx2.Client) -> dict[str, int]:
    """Number of batches that a server has drawn, by size; "4" counts those of three or four images."""
    text = client.get("/metrics").text
    found = re.findall(r'^fp4dit_batch_size_bucket\{le="(\d+)\.0"\} (\S+)', text, re.MULTILINE)
    counts, below = {}, 0
    for size, total in found:
        counts[size], below = int(float(total)) - below, int(float(total))
    return counts


def percentile(values: list[float], percent: int) -> float:
    """Percentile of ``values``, interpolated."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def measure(
    servers: Mapping[str, str], options: Sequence[str], clients: Sequence[int], requests: int, rounds: int, steps: int,
    prompts: Sequence[str], seconds: float,
) -> Results:  # fmt: skip
    """Starts every server and measures them in turns.

    Args:
        servers: models by name of the server; the first is the baseline.
        options: options of ``fp4dit-ao serve``.
        clients: numbers of simultaneous clients to measure with.
        requests: requests per turn.
        rounds: most rounds, at least one.
        steps: denoising steps of every image.
        prompts: prompts, used in turn.
        seconds: time after which no further round begins.

    Raises:
        RuntimeError: a server or a request failed.
    """
    results: Results = {name: {number: [] for number in clients} for name in servers}
    with ExitStack() as stack:
        asked = {name: stack.enter_context(server(model, *options)) for name, model in servers.items()}
        for name, client in asked.items():
            print(f"warming up {name}", flush=True)
            wait_until_ready(client)
        began = time.monotonic()
        for turn in tqdm(range(rounds), desc="rounds"):
            if turn and time.monotonic() - began > seconds:
                print(f"stopped after {turn} of {rounds} rounds: {seconds:g} s are over", flush=True)
                break
            chosen = [prompts[(turn * requests + i) % len(prompts)] for i in range(requests)]
            for number in clients:
                for name in list(asked)[:: -1 if turn % 2 else 1]:
                    results[name][number].append(load(asked[name], chosen, number, steps, turn * requests))
    return results


def main(
    recipe: str = "w4a6_e2m1",
    clients: Annotated[str, typer.Option(help="Requests in flight at once, separated by commas.")] = "1,8",
    requests: Annotated[int, typer.Option(min=2, max=1000, help="Of one turn.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Turns of each server, at most.")] = 4,
    seconds: Annotated[float, typer.Option(min=0, help="After these no further round begins.")] = 120,
    steps: Annotated[int, typer.Option(min=1, max=100)] = 10,
    max_batch: int = 8,
    compile: bool = True,
    out: Path = Path("benchmarks/results"),
) -> None:
    """Measures and prints; writes ``serving.json``."""
    numbers = [int(text) for text in clients.split(",")]
    known = reference.prompts()
    pipe = named_models.open_pipeline(named_models.REFERENCE, "cpu")
    quantized = quantize_pipeline(pipe, recipe, prompts=known[:4], rounding="nearest", progress=False)
    options = ["--device", "cpu", "--max-batch", str(max_batch), "--timeout", str(READY_SECONDS)]
    options.append("--compile" if compile else "--no-compile")
    with tempfile.TemporaryDirectory() as folder:
        quantized.save_pretrained(f"{folder}/quantized")
        servers = {"unquantized": named_models.REFERENCE, recipe: f"{folder}/quantized"}
        results = measure(servers, options, numbers, requests, rounds, steps, known, seconds)
    print(table(results))
    settings = {
        "recipe": recipe,
        "requests": requests,
        "rounds": len(results[recipe][numbers[0]]),
        "steps": steps,
        "max_batch": max_batch,
        "compile": compile,
    }
    print(
        f"\n{', '.join(f'{key} {value}' for key, value in settings.items())}; both servers on one machine. {one_line()}"
    )
    result = {"settings": settings, "environment": environment(), "results": results}
    write_text(out / "serving.json", json.dumps(result, indent=1) + "\n")


def table(results: Results) -> str:
    """Table with a row per number of clients and server; throughput also as a ratio to the first server's."""
    rows = []
    base = next(iter(results.values()))
    for number in base:
        for name, by_number in results.items():
            turns = by_number[number]
            latencies = [took for turn in turns for took in turn["latencies"]]
            rates = [len(turn["latencies"]) / turn["seconds"] for turn in turns]
            ratios = [b["seconds"] / own["seconds"] for b, own in zip(base[number], turns, strict=True)]
            rows.append(
                [str(number), name, batch_sizes(turns), f"{statistics.median(rates):.2f}",
                 f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                 *(f"{percentile(latencies, percent) * 1000:.0f}" for percent in PERCENTILES)]
            )  # fmt: skip
    head = ["clients", "server", "images / batch", "images / s", "of the unquantized"]
    return markdown_table([*head, *(f"p{p}, ms" for p in PERCENTILES)], rows) + "\n\n" + same_bits(results)


def batch_sizes(turns: Sequence[Mapping[str, Any]]) -> str:
    """Mean batch size, and the upper bound of the largest from the histogram."""
    counts: Counter[int] = Counter()
    for turn in turns:
        counts.update({int(size): count for size, count in turn["batches"].items() if count})
    images = sum(len(turn["latencies"]) for turn in turns)
    return f"{images / counts.total():.1f} (at most {max(counts)})"


def same_bits(results: Results) -> str:
    """Sentence with the number of images whose bits do not depend on the number of clients, and so on their batch."""
    parts = []
    for name, by_number in results.items():
        first, *others = ([digest for turn in turns for digest in turn["images"]] for turns in by_number.values())
        equal = sum(len({a, *rest}) == 1 for a, *rest in zip(first, *others, strict=True))
        parts.append(f"{name} {equal} of {len(first)}")
    return f"Images with the same bits whatever the number of clients: {', '.join(parts)}."


if __name__ == "__main__":
    typer.run(main)
