"""Two replicas on a local Ray: warm before they answer, both at work, and of one mind."""

import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError

from tests.ray_cluster import ray_cluster

pytestmark = pytest.mark.timeout(400)  # 40 s on two idle cores


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster():
        yield


@pytest.fixture(scope="module")
def address(cluster: None, tiny_quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    from ray import serve

    from fp4dit_ao.serving.ray import Arguments, build

    folder = tmp_path_factory.mktemp("ray") / "tiny-w4a6"
    tiny_quantized.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {"same_bits": True, "compile": False, "device": "cpu", "max_batch": 2}
    serve.run(build(Arguments(model=str(folder), replicas=2, cpus=0.5, **options)))
    return f"http://127.0.0.1:{port}"


def test_two_replicas_share_the_work_and_draw_the_same_bits(address: str) -> None:
    from ray import serve

    (deployment,) = serve.status().applications["default"].deployments.values()
    assert deployment.replica_states == {"RUNNING": 2}
    with httpx2.Client(base_url=address, timeout=120) as client, ThreadPoolExecutor(8) as pool:
        assert client.get("/health/ready").json() == {"status": "ready"}
        body = {"prompt": "a red cat", "seed": 3}
        answers = list(pool.map(lambda _: client.post("/v1/images/generations", json=body), range(16)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["data"][0]["b64_json"] for answer in answers}) == 1
        assert client.post("/v1/images/generations", json={}).status_code == 400
        drawn: dict[str, float] = {}
        end = time.monotonic() + 60
        while sum(drawn.values()) < 16 and time.monotonic() < end:  # either replica answers with its own count
            text = client.get("/metrics").text
            total, created = (
                re.search(rf"^fp4dit_images_{name} (\S+)", text, re.MULTILINE) for name in ("total", "created")
            )
            assert total and created
            drawn[created[1]] = float(total[1])
    assert len(drawn) == 2
    assert all(drawn.values())
    assert sum(drawn.values()) == 16


def test_replicas_load_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp4dit_ao.serving import ray as deployed

    class Loaded(Exception):
        pass

    def application(model: str, options: Any) -> Any:
        raise Loaded(model, options)

    replicas: list[Any] = []

    def ingress(replica: Any) -> Any:
        replicas.append(replica)
        return lambda: type("Replica", (), {})

    monkeypatch.setattr(deployed, "application", application)
    monkeypatch.setattr(deployed.serve, "ingress", ingress)
    deployed.build(deployed.Arguments(model="DIR", name="tiny", weights="int8", window=5, max_batch=2, compile=False))
    with pytest.raises(Loaded) as seen:
        replicas[0]()
    model, options = seen.value.args
    assert (model, options.name, options.weights, options.compile) == ("DIR", "tiny", "int8", False)
    assert (options.batching.max_batch, options.batching.window) == (2, 0.005)
    with pytest.raises(ValidationError, match="'packed', 'int8', 'fp8' or 'auto'"):
        deployed.Arguments(model="DIR", weights="int4")
