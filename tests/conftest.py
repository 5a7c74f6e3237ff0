"""What all tests share: what several of them need and is slow to make, and caches of compiled code."""

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch.compiler.config
from hypothesis import HealthCheck, settings
from torch.multiprocessing.reductions import StorageWeakRef

from fp4dit_ao.util.user_cache import VARIABLE
from tests.tiny import CALL, tiny_pipeline

ROOT = Path(__file__).parents[1]

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

SLOW = (
    "tests/benchmark",
    "tests/calibration/test_uncomputed_calls.py::test_a_pipelines_first_call_is_the_same",
    "tests/checkpoint/test_checkpoint.py::test_every_tensor_comes_back_bit_for_bit",
    "tests/checkpoint/test_checkpoint_fuzz.py",
    "tests/checkpoint/test_custom_codebook.py",
    "tests/checkpoint/test_single_file.py",
    "tests/cli",
    "tests/deploy",
    "tests/diffusers_integration",
    "tests/evaluation/test_report.py::test_a_person_can_use_it",
    "tests/evaluation/test_report.py::test_it_reads_on_a_narrow_screen",
    "tests/families",
    "tests/formats/test_formats.py::test_wild_floats",
    "tests/graph_capture/test_layer_rows.py",
    "tests/kernels/test_arm.py",
    "tests/kernels/test_decoded_linear.py::test_choosing_it_breaks_no_graph",
    "tests/kernels/test_decoded_linear.py::test_decoding_looks_every_code_up",
    "tests/kernels/test_few_tokens.py::test_codes_are_looked_up_in_pairs_of_one_row_in_every_tile",
    "tests/kernels/test_fp8_attention.py::test_it_is_attention",
    "tests/kernels/test_fp8_attention.py::test_the_operator_agrees_with_rounded_values",
    "tests/kernels/test_native.py::test_the_benchmark_of_tokens_prints_its_table",
    "tests/kernels/test_triton_linear.py",
    "tests/ops/test_ops.py::test_blocks_may_be_symbols",
    "tests/passes/fine_tuning/test_bias_correction.py",
    "tests/passes/fine_tuning/test_binarydm.py",
    "tests/passes/fine_tuning/test_distillation.py",
    "tests/passes/fine_tuning/test_quest.py",
    "tests/passes/fine_tuning/test_scale_tuning.py::test_the_converted_graph_errs_less_by_what_the_report_says",
    "tests/passes/reconstruction/objectives/test_network_objectives.py",
    "tests/passes/reconstruction/test_memory_budget.py::test_a_model_three_times_as_large_as_its_memory",
    "tests/passes/reconstruction/test_memory_budget.py::test_files_change_no_bit",
    "tests/passes/reconstruction/test_plateau.py",
    "tests/passes/reconstruction/test_reconstruct.py::test_a_killed_run_resumes_with_the_same_bits",
    "tests/passes/reconstruction/scopes",
    "tests/passes/reconstruction/test_shards.py::test_two_processes_give_the_bits_of_one_and_resume_when_one_was_killed",
    "tests/passes/reconstruction/test_closed_form.py",
    "tests/passes/transforms/test_smoothquant.py",
    "tests/passes/test_lowering.py::test_the_lowered_graph_keeps_nothing_else_alive",
    "tests/passes/test_block_outlining.py::test_blocks_of_a_family_are_alike",
    "tests/passes/transforms/test_adaptive_rotation.py::test_modules_and_files_compute_the_same_bits",
    "tests/passes/transforms/test_first_token.py::test_files_come_back_in_both_forms_with_the_same_bits",
    "tests/passes/transforms/test_hadamard.py::test_the_function_of_a_family_stays",
    "tests/passes/transforms/test_low_rank.py::test_modules_and_files_compute_the_same_bits",
    "tests/passes/transforms/test_outlier_groups.py::test_modules_and_files_compute_the_same_bits",
    "tests/passes/transforms/test_round_trips.py",
    "tests/passes/transforms/test_timestep_ranges.py::test_files_come_back_as_graphs_with_the_same_bits",
    "tests/passes/transforms/test_weight_equalization.py::test_files_come_back_in_both_forms_with_the_same_bits",
    "tests/reference",
    "tests/serving/test_app.py::test_a_port_that_is_taken_is_said_before_the_model_is_loaded",
    "tests/serving/test_app.py::test_the_command_serves_the_models_images_and_ends_clean",
    "tests/serving/test_editing.py",
    "tests/serving/test_engine.py::test_images_do_not_depend_on_their_neighbours",
    "tests/serving/test_load_benchmark.py",
    "tests/serving/test_ray.py",
    "tests/serving/test_streaming.py::test_openais_client_draws_streams_edits_and_reads_errors",
    "tests/tensors/test_block_scaled.py",
    "tests/tensors/test_levels.py::test_memory_or_speed_is_chosen_when_a_pipeline_is_loaded",
    "tests/tensors/test_sharding.py",
    "tests/test_compat.py",
    "tests/test_public_names.py::test_diffusers_finds_the_quantizer",
    "tests/test_registration.py",
    "tests/util/test_world.py::test_three_processes_get_the_bits_of_one",
)
"""Folders, files and tests that take longer than the fast set can wait for; so does every test with ``compile`` in its name."""
DOCS = ("tests/test_docs.py::test_page", "tests/test_docs.py::test_docstring", "tests/test_tutorials.py")
"""Tests that execute the documentation."""
GPU = (
    "tests/ops/test_ops.py::test_cuda_agrees_with_cpu",
    "tests/passes/reconstruction/test_iteration.py::test_a_captured_step_learns_what_an_eager_one_does_on_cuda",
    "tests/passes/reconstruction/test_iteration.py::test_replays_take_steps_on_cuda",
    "tests/passes/reconstruction/test_iteration.py::test_what_cannot_be_captured_goes_on_eagerly_on_cuda",
    "tests/passes/test_streamed_lowering.py::test_weights_in_host_memory_are_rounded_on_the_gpu",
)
"""Tests that need a GPU, and are skipped without one."""

LONGEST = (
    "tests/families/test_families.py",
    "tests/test_docs.py",
    "tests/deploy/test_export.py",
    "tests/serving/test_ray.py",
    "tests/serving/test_load_benchmark.py",
    "tests/passes/reconstruction/test_memory_budget.py",
    "tests/checkpoint/test_checkpoint_fuzz.py",
    "tests/benchmark/test_benchmark.py",
    "tests/benchmark/test_bigger_than_memory.py",
    "tests/passes/fine_tuning/test_distillation.py",
    "tests/benchmark/test_paper_table.py",
    "tests/passes/fine_tuning/test_scale_tuning.py",
)
"""Files that take longest, which run first and in this order: what takes seconds is left to the end, where one of two
processes would wait for the other."""

PACKAGES = ("torch", "torchao", "diffusers", "transformers", "triton", "numpy")


def _refuse_copy(ref: StorageWeakRef, protocol: object) -> NoReturn:
    """Takes the place of what copies and pickles a weak reference to a storage, in all tests."""
    raise AssertionError(
        "a weak reference to a storage is copied, as by deepcopy of a fake tensor's mode: both copies would free it, and the "
        "process crash some time later; see _compat.copied"
    )


StorageWeakRef.__reduce_ex__ = _refuse_copy


def _sources() -> str:
    """A digest of every source file: torch's caches know our operators by name, not by what they trace to."""
    digest = hashlib.sha256()
    for folder in ("fp4dit_ao", "passes", "observers"):
        for path in sorted(file for suffix in ("*.py", "*.c", "*.h") for file in (ROOT / folder).rglob(suffix)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


torch.compiler.config.cache_key_tag = _sources()  # what a run compiled serves the next one only if nothing changed


def _among(item: pytest.Item, table: tuple[str, ...]) -> bool:
    whole = item.nodeid.partition("[")[0]
    return any(whole == entry or whole.startswith((f"{entry}/", f"{entry}::")) for entry in table)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves slow files and folders out of ``pytest -m fast``, which then imports none of them."""
    if config.getoption("markexpr") != "fast" or not collection_path.is_relative_to(ROOT):
        return None
    return str(collection_path.relative_to(ROOT)) in SLOW or None


def pytest_configure(config: pytest.Config) -> None:
    """Lets several processes take files in the order of the tests; pytest-xdist's own is by how many tests a file has."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test ``slow``, ``docs`` or ``gpu`` by the tables above, and ``fast`` if it is none of them; the longest
    files come first."""
    place = {path: number for number, path in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))
    for item in items:
        slow = _among(item, SLOW) or "compile" in item.name.partition("[")[0]
        marks = [
            name for name, holds in (("docs", _among(item, DOCS)), ("gpu", _among(item, GPU)), ("slow", slow)) if holds
        ]
        for mark in marks or ["fast"]:
            item.add_marker(mark)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the tests ran on, above the line that counts them: a row of docs/versions.md."""
    installed = {found.name: found.version for found in metadata.distributions() if found.name in PACKAGES}
    versions = ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    terminalreporter.write_line(f"Python {platform.python_version()}, {versions}")


@pytest.fixture(scope="session", autouse=True)
def _the_users_cache_is_left_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ[VARIABLE] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_quantized() -> Any:
    """The tiny pipeline with one block, W4A6, rounded to nearest; not to be changed."""
    from fp4dit_ao import quantize_pipeline

    how = {"prompts": ["a red cat", "a blue dog"], "rounding": "nearest", "progress": False}
    pipe = quantize_pipeline(tiny_pipeline(layers=1), "w4a6", **how, **CALL)
    pipe.generation_defaults = dict(CALL)
    pipe.set_progress_bar_config(disable=True)
    return pipe
