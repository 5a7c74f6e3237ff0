"""A Ray of two CPUs on this machine, for tests that need a cluster."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing leaves the machine
    "RAY_worker_niceness": "0",  # of 15, with which a busy machine starves the replicas
    "RAY_memory_monitor_refresh_ms": "0",  # which kills workers when other processes fill the memory
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",  # of 5: importing takes longer on a busy machine
}


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Ray with two CPUs on loopback alone, none of whose processes or files outlive the context."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # names of sockets in it must be short
    others = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        import ray

        try:
            ray.init(
                num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False,
                _node_ip_address="127.0.0.1", _temp_dir=folder,
            )  # fmt: skip
            yield
        finally:
            ours = set(psutil.Process().children(recursive=True)) - others
            ray.shutdown()
            _, alive = psutil.wait_procs(ours, timeout=10)
            for process in alive:
                process.kill()
            shutil.rmtree(folder, ignore_errors=True)


def run_apart(file: Path) -> None:
    """Runs the tests of a file in a process of their own.

    Ray replaces a process's handlers of signals: if it crashed later, in another file's test, nothing would say where.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "--tb=short", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-10_000:]}\n{done.stderr[-3000:]}"
