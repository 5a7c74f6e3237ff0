"""What BinaryDM has for more than one bit: a second basis that fades out, and features in the teacher's main directions."""

import numpy as np
import pytest
import torch
from torchao.quantization.granularity import PerGroup

from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.passes.fine_tuning import binarydm
from fp4dit_ao.passes.fine_tuning.binarydm import EvolvableBasis, Mimicking, principal_components
from fp4dit_ao.passes.fine_tuning.latent_weight import FullWeight
from tests.passes.fine_tuning.methods import TimedDiT, lesson, prepared, samples


def test_the_second_basis_is_the_sign_of_what_is_left_and_fades() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    observer = WeightObserver("e2m1", PerGroup(32))
    student, rounded = EvolvableBasis(weight, observer), observer.dequantized(weight)
    left = weight - rounded
    row = left.abs().mean(1, keepdim=True)
    torch.testing.assert_close(student(weight), rounded + row * left.sign(), rtol=1e-5, atol=1e-7)
    assert float((student(weight) - weight).square().mean()) < float(left.square().mean())
    with torch.no_grad():
        student.second.mul_(2)
    assert float(student.penalty()) == pytest.approx(4)
    student.advance(5, 10)
    torch.testing.assert_close(student(weight), rounded + row * left.sign(), rtol=1e-4, atol=1e-6)  # half of twice
    student.advance(10, 10)
    torch.testing.assert_close(student(weight), rounded, rtol=1e-6, atol=1e-9)


def test_principal_components_are_numpys() -> None:
    features = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 16) + 1
    found = principal_components(features)
    rows = features.flatten(0, 1).double().numpy()
    _, _, right = np.linalg.svd(rows - rows.mean(0))
    assert found.shape == (16, 4)
    np.testing.assert_allclose(np.abs((found.numpy() * right[:4].T).sum(0)), 1, rtol=1e-5)


def test_the_loss_compares_features_of_blocks_in_these_directions() -> None:
    found = lesson(prepared())
    loss = Mimicking(found)
    assert [tuple(k.shape) for k in loss.components] == [(128, 32)] * 2
    model, kept = TimedDiT().eval(), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, y: kept.append(y.detach()))
    model(**samples()[0])
    model(**samples()[2])
    parts = []
    with torch.no_grad():
        _, quantized = loss.model.run(found.calls[2])
    for first, wanted, y, k in zip(kept[:2], kept[2:], quantized, loss.components, strict=True):
        torch.testing.assert_close(k, principal_components(first), rtol=1e-2, atol=1e-3)
        x = wanted @ k
        parts.append(float((y @ k - x).square().mean() / x.square().mean()))
    output = float(found.output_error(2).detach())
    assert float(loss(2).detach()) == pytest.approx(output + binarydm.MIMICKING * sum(parts) / 2, rel=1e-3)


def test_the_first_and_the_last_block_have_a_second_basis() -> None:
    found = lesson(prepared())
    course = binarydm.plan(found)
    kinds = {observer.name: type(student) for observer, student in course.students.items()}
    assert kinds.pop("time.weight") is FullWeight
    assert set(kinds.values()) == {EvolvableBasis}  # both blocks of two
    penalty = course.loss(1) - Mimicking(found)(1)
    power = sum(float(found.output_error(i).detach()) for i in range(4)) / 4
    assert float(penalty.detach()) == pytest.approx(binarydm.PENALTY * power, rel=1e-2)
