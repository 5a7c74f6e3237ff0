"""Replicas on Ray: what they load; on a cluster, in on_ray.py."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.ray_cluster import run_apart

pytestmark = pytest.mark.timeout(500)


def test_on_a_cluster() -> None:
    run_apart(Path(__file__).with_name("on_ray.py"))


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
