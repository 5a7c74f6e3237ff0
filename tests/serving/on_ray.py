"""Two replicas on a local Ray: warm before they answer, both at work, and of one mind.

A file of its own, which ``test_ray.py`` runs in a process of its own.
"""

import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

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
