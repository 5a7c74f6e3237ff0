"""Two replicas on a local Ray, if Ray is installed: warm before they answer, both at work, and of one mind."""

import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'fp4dit-ao[ray]'")


@pytest.fixture(scope="module")
def address(tiny_quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from ray import serve

    from fp4dit_ao.serving.ray import Arguments, build

    folder = tmp_path_factory.mktemp("ray") / "tiny-w4a6"
    tiny_quantized.save_pretrained(folder)
    os.environ.setdefault(
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60"
    )  # of 5: importing takes longer on a busy machine
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {"same_bits": True, "compile": False, "device": "cpu", "max_batch": 2}
        serve.run(build(Arguments(model=str(folder), replicas=2, cpus=0.5, **options)))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_two_replicas_share_the_work_and_draw_the_same_bits(address: str) -> None:
    from ray import serve

    (deployment,) = serve.status().applications["default"].deployments.values()
    assert deployment.replica_states == {"RUNNING": 2}
    with httpx2.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(8) as pool:
        assert client.get("/health/ready").json() == {"status": "ready"}
        body = {"prompt": "a red cat", "seed": 3}
        answers = list(pool.map(lambda _: client.post("/v1/images/generations", json=body), range(16)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["data"][0]["b64_json"] for answer in answers}) == 1
        assert client.post("/v1/images/generations", json={}).status_code == 400
        drawn = {}
        for _ in range(40):
            text = client.get("/metrics").text
            total, created = (
                re.search(rf"^fp4dit_images_{name} (\S+)", text, re.MULTILINE) for name in ("total", "created")
            )
            assert total and created
            drawn[created[1]] = float(total[1])
    assert len(drawn) == 2  # either replica answers with its own count
    assert all(drawn.values())
    assert sum(drawn.values()) == 16
