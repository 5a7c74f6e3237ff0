"""The HTTP application: the images API, its errors, its limits; and the command, as a process of its own."""

import asyncio
import base64
import contextlib
import gc
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import schemathesis
import torch
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from typer.testing import CliRunner

from fp4dit_ao.cli.app import app as command
from fp4dit_ao.serving import launch
from fp4dit_ao.serving.app import GENERATIONS, Access, Limits, create_app
from fp4dit_ao.serving.drawing import Painter
from fp4dit_ao.serving.engine import Engine
from fp4dit_ao.serving.engine_types import Batching, Style
from fp4dit_ao.serving.pictures import Pictures
from tests.serving.test_engine import Gate, picture

DEFAULT = Style(32, 32, 4)
LIMITS = Limits(prompt=50, n=3, side=64, steps=10, timeout=30)


@pytest.fixture
def gate() -> Gate:
    gate = Gate()
    gate.open.set()
    return gate


def serve(gate: Gate, limits: Limits = LIMITS, warm_up: Any = lambda: None, **batching: Any) -> TestClient:
    engine = Engine(gate, warm_up, Batching(**({"window": 0.0} | batching)))
    app = create_app(engine, "tiny", DEFAULT, 8, limits)
    client = TestClient(app, raise_server_exceptions=False)
    client.app_state["engine"] = engine
    return client


@pytest.fixture
def client(gate: Gate) -> Iterator[TestClient]:
    with serve(gate) as client:
        client.app_state["engine"].wait_until_ready(30)
        yield client


def ask(client: Any, **body: Any) -> Any:
    return client.post(GENERATIONS, json={"prompt": "a cat"} | body)


def pixels(data: dict[str, Any]) -> np.ndarray:
    return np.asarray(Pillow.open(io.BytesIO(base64.b64decode(data["b64_json"], validate=True))))


def refused(response: Any, status: int, message: str, **fields: Any) -> None:
    """An error in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(message, error["message"]), error["message"]
    assert {name: error[name] for name in fields} == fields


# --- what works ------------------------------------------------------------------------------------------------------


def test_images_have_their_seeds(client: TestClient, gate: Gate) -> None:
    answer = ask(client, n=3, seed=7, size="16x24", steps=2, model="tiny", user="me").json()
    assert [data["seed"] for data in answer["data"]] == [7, 8, 9]
    assert (answer["size"], answer["steps"], answer["output_format"]) == ("16x24", 2, "png")
    assert abs(answer["created"] - time.time()) < 60
    style = Style(16, 24, 2)
    for seed, data in zip((7, 8, 9), answer["data"], strict=True):
        np.testing.assert_array_equal(pixels(data), picture(style, "a cat", seed))
    assert gate.batches == [(style, ["a cat"] * 3, [7, 8, 9])]


def test_defaults(client: TestClient, gate: Gate) -> None:
    first, second = ask(client).json(), ask(client, size="auto").json()
    assert first["size"] == "32x32"
    assert first["steps"] == 4
    assert first["data"][0]["seed"] != second["data"][0]["seed"]
    assert gate.batches[0][2] == [first["data"][0]["seed"]]


def test_the_last_seed_is_followed_by_zero(client: TestClient) -> None:
    answer = ask(client, n=2, seed=2**63 - 1).json()
    assert [data["seed"] for data in answer["data"]] == [2**63 - 1, 0]


@pytest.mark.parametrize(("output_format", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_output_formats(client: TestClient, output_format: str, magic: bytes) -> None:
    answer = ask(client, output_format=output_format, output_compression=50).json()
    assert base64.b64decode(answer["data"][0]["b64_json"]).startswith(magic)
    assert answer["output_format"] == output_format


def test_models(client: TestClient) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json() == card
    refused(client.get("/v1/models/gpt"), 404, "the model 'gpt' does not exist; this server has 'tiny'")


def test_requests_that_arrive_together_are_drawn_together(gate: Gate) -> None:
    gate.open.clear()
    with serve(gate, max_batch=4) as client, ThreadPoolExecutor(6) as pool:
        engine = client.app_state["engine"]
        engine.wait_until_ready(30)
        answers = [pool.submit(ask, client, seed=0)]
        assert gate.entered.wait(30)
        answers += [pool.submit(ask, client, seed=seed) for seed in range(1, 5)]
        wait_for(lambda: engine.metrics.registry.get_sample_value("fp4dit_queue_depth") == 4)
        gate.open.set()
        for seed, answer in enumerate(answers):
            assert answer.result(30).json()["data"][0]["seed"] == seed
    assert [sorted(seeds) for _, _, seeds in gate.batches] == [[0], [1, 2, 3, 4]]


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_metrics(client: TestClient) -> None:
    ask(client, n=2)
    ask(client, n=99)
    text = client.get("/metrics").text
    for line in (
        'fp4dit_requests_total{code="200"} 1.0', 'fp4dit_requests_total{code="400"} 1.0', "fp4dit_images_total 2.0",
        'fp4dit_batch_size_bucket{le="2.0"} 1.0', 'fp4dit_request_seconds_count{code="200"} 1.0', "fp4dit_ready 1.0",
        "fp4dit_queue_depth 0.0", "fp4dit_queue_seconds_count 2.0", "fp4dit_batch_seconds_count 1.0",
    ):  # fmt: skip
        assert line in text


def test_nulls_and_openais_own_values_are_taken(client: TestClient) -> None:
    nulls = dict.fromkeys(
        ["model", "n", "size", "seed", "steps", "response_format", "output_format", "output_compression"]
    )
    more = dict.fromkeys(["background", "quality", "style", "moderation", "stream", "user"])
    for body in (nulls | more, {"quality": "hd", "style": "natural", "moderation": "low"}, {"quality": "high"}):
        answer = ask(client, **body)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == 1


def test_pictures_by_their_url(client: TestClient) -> None:
    answer = ask(client, response_format="url", output_format="webp", n=2, seed=5).json()
    pictures = [client.get(data["url"]) for data in answer["data"]]
    assert [picture.headers["content-type"] for picture in pictures] == ["image/webp"] * 2
    assert all(picture.content[8:12] == b"WEBP" for picture in pictures)
    assert "b64_json" not in answer["data"][0]
    refused(client.get("/v1/images/files/none.png"), 404, "no picture none.png", code="not_found")


def test_the_store_of_pictures_is_bounded() -> None:
    pictures = Pictures(limit=100)
    names = [pictures.add(bytes(40), "png") for _ in range(5)]
    assert [pictures.get(name) is not None for name in names] == [False, False, False, True, True]
    assert pictures.get(pictures.add(bytes(1000), "jpeg")) == (
        bytes(1000),
        "image/jpeg",
    )  # the latest is kept, whatever its size
    assert pictures.get(names[-1]) is None


@pytest.fixture
def guarded(gate: Gate) -> Iterator[TestClient]:
    engine = Engine(gate, batching=Batching(window=0.0))
    access = Access("secret", ["https://example.org"])
    with TestClient(create_app(engine, "tiny", DEFAULT, 8, LIMITS, access)) as client:
        engine.wait_until_ready(30)
        yield client


@pytest.mark.parametrize(
    "header", [None, "secret", "Bearer", "Bearer secre", "Bearer secret2", "Basic secret", "bearer \xff"]
)
def test_a_key_is_asked_for(guarded: TestClient, gate: Gate, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for answer in (
        guarded.post(GENERATIONS, json={"prompt": "a cat"}, headers=headers),
        guarded.get("/v1/models", headers=headers),
        guarded.get("/metrics", headers=headers),
    ):
        refused(answer, 401, "API key is missing or wrong", type="authentication_error", code="invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert not gate.batches


def test_a_key_opens_and_health_needs_none(guarded: TestClient) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        assert guarded.get(path).status_code == 200
    headers = {"Authorization": "Bearer secret"}
    answer = guarded.post(GENERATIONS, json={"prompt": "a cat", "response_format": "url"}, headers=headers)
    assert guarded.get(answer.json()["data"][0]["url"]).status_code == 200  # as an <img> asks: without a key


def test_pages_of_named_origins_may_ask(guarded: TestClient, client: TestClient) -> None:
    asks = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    answer = guarded.options(GENERATIONS, headers=asks | {"Access-Control-Request-Headers": "authorization"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    assert (
        "access-control-allow-origin"
        not in guarded.options(GENERATIONS, headers=asks | {"Origin": "https://evil.org"}).headers
    )
    refusal = guarded.get("/v1/models", headers={"Origin": "https://example.org"})
    assert refusal.status_code == 401 and refusal.headers["access-control-allow-origin"] == "https://example.org"
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=asks).headers


# --- bad requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": " \n"}, "prompt", "prompt: the prompt is blank"),
        ({"prompt": "x" * 51}, "prompt", "at most 50 characters"),
        ({"prompt": "\ud800"}, "prompt", "unicode"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 4}, "n", "less than or equal to 3"),
        ({"n": True}, "n", "valid integer"),
        ({"n": "2"}, "n", "valid integer"),
        ({"steps": 11}, "steps", "less than or equal to 10"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than or equal to"),
        ({"size": "64"}, "size", "size: give 'auto', or WIDTHxHEIGHT such as 512x512"),
        ({"size": "63x64"}, "size", "size is 63x64; each side must be a multiple of 8, and at most 64"),
        ({"size": "64x72"}, "size", "at most 64"),
        ({"response_format": "file"}, "response_format", "'b64_json' or 'url'"),
        ({"quality": "best"}, "quality", "'standard'"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 101}, "output_compression", "less than or equal to 100"),
        ({"background": "transparent"}, "background", "'auto' or 'opaque'"),
        ({"stream": 1}, "stream", "valid boolean"),
        ({"stream": True, "n": 2}, "n", "a stream holds one image"),
        ({"stream": True, "response_format": "url"}, "response_format", "as b64_json"),
        ({"stream": True, "partial_images": 2}, "partial_images", "cannot show what it is drawing"),
        ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
        ({"partial_images": 2}, "partial_images", "ask for stream, too"),
        ({"lora": "x"}, "lora", "unknown parameter: lora"),
    ],
    ids=str,
)
def test_wrong_fields(client: TestClient, gate: Gate, body: dict[str, Any], param: str, message: str) -> None:
    content = json.dumps({"prompt": "a cat"} | body)
    answer = client.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"})
    refused(answer, 400, message, param=param, type="invalid_request_error")
    assert not gate.batches


def test_another_model(client: TestClient) -> None:
    refused(ask(client, model="dall-e-3"), 404, "'dall-e-3' does not exist", code="model_not_found", param="model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a JSON object"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"\x80\x81", "parsing the body"),
        (b"[" * 4000, "parsing the body|not valid JSON"),  # Python 3.13 reads this deep, to the end that is missing
        (b'{"prompt": "x", "seed": ' + b"9" * 4500 + b"}", "parsing the body"),
    ],
    ids=["empty", "cut", "list", "not unicode", "deep", "huge number"],
)
def test_bodies_that_are_no_request(client: TestClient, content: bytes, message: str) -> None:
    refused(client.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"}), 400, message)


def test_a_body_without_its_type(client: TestClient) -> None:
    content = b'{"prompt": "x"}'
    refused(client.post(GENERATIONS, content=content, headers={"Content-Type": "text/plain"}), 400, "application/json")


def test_a_large_body_is_not_read_whole(client: TestClient) -> None:
    sent = []

    def parts() -> Iterator[bytes]:
        for _ in range(1000):
            sent.append(1)
            yield b"x" * 1000

    refused(client.post(GENERATIONS, content=parts()), 413, "larger than 4696 bytes", code="too_large")
    escaped = json.dumps({"prompt": "\U0001f600" * 50})  # the longest prompt there may be
    answer = client.post(GENERATIONS, content=escaped, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200


def test_other_paths_and_methods(client: TestClient) -> None:
    refused(
        client.post("/v1/images/variations", content=b"x" * 10_000), 404, "Not Found"
    )  # before it is found too large
    refused(client.get("/v1/images"), 404, "GET /v1/images: Not Found")
    answer = client.get(GENERATIONS)
    refused(answer, 405, "Method Not Allowed")
    assert answer.headers["allow"] == "POST"


GATE = Gate()
ENGINE = Engine(GATE, batching=Batching(window=0))
APP = create_app(ENGINE, "tiny", DEFAULT, 8, LIMITS)
APP.router.lifespan_context = lambda _: contextlib.nullcontext()  # schemathesis starts and ends it with every call
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)


@pytest.fixture(scope="module")
def running() -> Iterator[None]:
    GATE.open.set()
    with ENGINE:
        ENGINE.wait_until_ready(30)
        yield


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_sent_is_answered_as_the_schema_says(running: None, mode: GenerationMode, data: Any) -> None:
    operation = data.draw(st.sampled_from([found.ok() for found in SCHEMA.get_all_operations()]))
    case = data.draw(operation.as_strategy(generation_mode=mode))
    # a size that is no multiple of 8, or the name of another model, is refused although the schema cannot say so
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


# --- limits and failures ---------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again(gate: Gate) -> None:
    gate.open.clear()
    with serve(gate, max_batch=1, max_queue=3) as client, ThreadPoolExecutor(2) as pool:
        engine = client.app_state["engine"]
        engine.wait_until_ready(30)
        running = pool.submit(ask, client)
        assert gate.entered.wait(30)
        waiting = pool.submit(ask, client, n=2)
        wait_for(lambda: engine.metrics.registry.get_sample_value("fp4dit_queue_depth") == 2)
        answer = ask(client, n=2)
        refused(
            answer, 429, "2 images are waiting already; try again later", type="rate_limit_error", code="queue_full"
        )
        assert int(answer.headers["retry-after"]) >= 1
        gate.open.set()
        assert running.result(30).status_code == waiting.result(30).status_code == 200
        assert 'fp4dit_requests_total{code="429"} 1.0' in client.get("/metrics").text


def test_limits_that_contradict_each_other(gate: Gate) -> None:
    with pytest.raises(ValueError, match="a queue of 2 images cannot hold a request for 3"):
        serve(gate, max_queue=2)
    with pytest.raises(ValueError, match="beyond the limits of 16 pixels and 10 steps"):
        serve(gate, Limits(side=16, steps=10))


def test_sides_are_limited_to_twice_the_models_own(gate: Gate) -> None:
    with serve(gate, Limits()) as client:
        client.app_state["engine"].wait_until_ready(30)
        assert ask(client, size="64x64").status_code == 200
        refused(ask(client, size="72x64"), 400, "at most 64", param="size")


def test_what_nobody_listens_for_leaves_the_queue(gate: Gate) -> None:
    gate.open.clear()
    engine = Engine(gate, batching=Batching(1, 0))
    app = create_app(engine, "tiny", DEFAULT, 8, LIMITS)
    body = json.dumps({"prompt": "a cat"}).encode()
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    scope = {
        "type": "http", "method": "POST", "path": GENERATIONS, "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json")], "server": ("test", 80), "client": ("test", 1), "state": {},
    }  # fmt: skip

    async def receive() -> Any:
        return messages.pop(0)

    async def send(_: Any) -> None:
        pass

    with engine:
        engine.wait_until_ready(30)
        running = engine.submit("running", [0], DEFAULT)[0]
        assert gate.entered.wait(30)
        asyncio.run(app(scope, receive, send))
        gate.open.set()
        running.result(30)
        assert engine.submit("next", [0], DEFAULT)[0].result(30).shape == (32, 32, 3)
    assert [prompts for _, prompts, _ in gate.batches] == [["running"], ["next"]]
    assert engine.metrics.registry.get_sample_value("fp4dit_requests_total", {"code": "499"}) == 1


def test_time_is_limited_for_what_waits_and_for_what_runs(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    gate.open.clear()
    limits = Limits(prompt=50, n=3, side=64, steps=10, timeout=0.3)
    with caplog.at_level("ERROR", "asyncio"), serve(gate, limits, max_batch=1) as client, ThreadPoolExecutor(2) as pool:
        client.app_state["engine"].wait_until_ready(30)
        answers = [pool.submit(ask, client, prompt=prompt) for prompt in ("first", "second")]
        for answer in answers:
            refused(answer.result(30), 504, "no image within 0.3 s", type="timeout_error", code="timeout")
        gate.open.set()
    assert len(gate.batches) == 1  # the other had left the queue
    gc.collect()
    assert not [record for record in caplog.records if "never retrieved" in record.getMessage()]


def test_before_and_after_the_warm_up(gate: Gate) -> None:
    warm = threading.Event()
    with serve(gate, warm_up=warm.wait) as client:
        assert client.get("/health/live").json() == {"status": "live"}
        answer = client.get("/health/ready")
        refused(answer, 503, "not ready: warming up")
        assert answer.headers["retry-after"] == "1"
        refused(ask(client), 503, "the model is warming up", code="not_ready")
        warm.set()
        client.app_state["engine"].wait_until_ready(30)
        assert client.get("/health/ready").json() == {"status": "ready"}
    assert client.app_state["engine"].state == "closed"


def test_a_model_that_fails_to_warm_up(gate: Gate) -> None:
    def fail() -> None:
        raise MemoryError("too large")

    with serve(gate, warm_up=fail) as client:
        wait_for(lambda: client.app_state["engine"].state == "failed")
        refused(client.get("/health/live"), 500, "failed to warm up: too large")
        refused(client.get("/health/ready"), 503, "failed")
        refused(ask(client), 503, "too large")


def test_a_failure_while_drawing_tells_no_internals() -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("secret")

    with serve(fail) as client:  # type: ignore[arg-type]
        client.app_state["engine"].wait_until_ready(30)
        answer = ask(client)
        refused(answer, 500, "the server failed", type="server_error", code="internal_error")
        assert "secret" not in answer.text
        assert 'fp4dit_requests_total{code="500"} 1.0' in client.get("/metrics").text


# --- the command, with a real model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "tiny-w4a6"
    tiny_quantized.save_pretrained(path)
    return path


def start(*arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from fp4dit_ao.cli.app import main; main()", "serve", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_command_serves_the_models_images_and_ends_clean(folder: Path, tiny_quantized: Any) -> None:
    process = start(folder, "--port", 0, "--no-compile", "--max-batch", 4, "--same-bits", "--device", "cpu")
    said: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"listening on (http://\S+);", line):
                break
        else:
            raise AssertionError("".join(said))
        with httpx2.Client(base_url=found[1], timeout=60) as client, ThreadPoolExecutor(3) as pool:
            wait_for(lambda: client.get("/health/ready").status_code == 200, 60)
            prompts = ["a red cat", "a blue dog", "green tree"]
            answers = list(pool.map(lambda prompt: ask(client, prompt=prompt, seed=3).json(), prompts))
            last = pool.submit(ask, client, prompt="a house", n=4, steps=40)
            wait_for(lambda: "fp4dit_images_total 3.0" in client.get("/metrics").text)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert last.result(60).status_code == 200
        assert process.wait(60) == 0
    finally:
        process.kill()
        said.append(process.communicate()[0])
    assert "Traceback" not in "".join(said)
    painter = Painter(tiny_quantized, 4, same_bits=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        (expected,) = painter.draw(painter.default, [prompt], [3])
        np.testing.assert_array_equal(pixels(answer["data"][0]), expected)


@pytest.mark.parametrize(("weights", "dtype"), [("packed", torch.uint8), ("int8", torch.int8)])
def test_memory_or_speed_is_chosen_on_the_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, weights: str, dtype: torch.dtype
) -> None:
    painters = []
    monkeypatch.setattr(launch, "Painter", lambda *arguments: painters.append(Painter(*arguments)) or painters[-1])
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)  # interrupted at once
    before = signal.getsignal(signal.SIGTERM)
    try:
        options = ["--port", "0", "--no-compile", "--device", "cpu", "--weights", weights]
        result = CliRunner().invoke(command, ["serve", str(folder), *options])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 0, result.output
    (painter,) = painters
    stored = [p.detach() for p in painter._pipe.transformer.graph.parameters()]
    assert {p.qdata.dtype for p in stored if hasattr(p, "qdata")} == {dtype}
    assert painter.draw(DEFAULT, ["a red cat"], [3])[0].shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("reference", "int8", "reference was not quantized by fp4dit-ao, it has no packed weights to turn into int8"),
        ("folder", "int4", "unknown weights 'int4'; choose one of packed, int8, fp8"),
        ("nowhere", "fp8", "there is no folder nowhere"),
    ],
)
def test_weights_that_a_model_has_not_are_refused_before_it_is_loaded(
    folder: Path, model: str, weights: str, message: str
) -> None:
    result = CliRunner().invoke(command, ["serve", str(folder) if model == "folder" else model, "--weights", weights])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "loading" not in result.output


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(folder, "--port", port)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"fp4dit-ao: cannot listen on 127.0.0.1:{port}: Address already in use; give another --port" in output
    assert "loading" not in output
