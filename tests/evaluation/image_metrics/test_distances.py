"""Distances of sets by their features: by hand, and by plain loops over the equations."""

import itertools
import math

import numpy as np
import pytest
from scipy import linalg

from fp4dit_ao.evaluation.image_metrics.cmmd import Cmmd
from fp4dit_ao.evaluation.image_metrics.frechet import FrechetDistance
from fp4dit_ao.evaluation.image_metrics.kernel_distance import KernelDistance

RANDOM = np.random.default_rng(0)
A, B = RANDOM.normal(size=(40, 6)), RANDOM.normal(0.3, 1.2, size=(40, 6))


def without_network(kind):
    return kind.__new__(kind)


def test_frechet_distance_solved_by_hand() -> None:
    """Means 1 and 3, variances 2 and 8: 2² + (√2 − √8)² = 6."""
    metric = without_network(FrechetDistance)
    assert metric.distance(np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]])) == pytest.approx(6)


def test_frechet_distance_is_its_equation() -> None:
    s, t = np.cov(A.T), np.cov(B.T)
    wanted = np.square(A.mean(0) - B.mean(0)).sum() + np.trace(s + t - 2 * linalg.sqrtm(s @ t).real)
    metric = without_network(FrechetDistance)
    assert metric.distance(A, B) == pytest.approx(wanted, rel=1e-6)
    assert metric.distance(A, A) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_its_equation() -> None:
    """Subsets of as many images as there are: each is the whole set."""

    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    n = len(A)
    within = sum(kernel(s[i], s[j]) for s in (A, B) for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
    across = sum(kernel(x, y) for x in A for y in B) / n**2
    metric = without_network(KernelDistance)
    assert metric.distance(A, B) == pytest.approx(1000 * (within - 2 * across), rel=1e-5)
    assert metric.distance(A, B) == metric.distance(A, B)


def test_cmmd_is_its_equation(monkeypatch) -> None:
    def mean(xs, ys):
        return sum(math.exp(-((x - y) @ (x - y)) / 200) for x in xs for y in ys) / (len(xs) * len(ys))

    wanted = 1000 * (mean(A, A) + mean(B, B) - 2 * mean(A, B))
    metric = without_network(Cmmd)
    assert metric.distance(A, B) == pytest.approx(wanted, rel=1e-9)
    monkeypatch.setattr("fp4dit_ao.evaluation.image_metrics.cmmd._ROWS", 7)
    assert metric.distance(A, B) == pytest.approx(wanted, rel=1e-9)
