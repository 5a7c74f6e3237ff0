"""The one place that touches private torch, torchao and diffusers API, a thin function for each use.

Tested in tests/test_compat.py against every version that we claim; tests/test_private_api.py refuses private names elsewhere.
:mod:`fp4dit_ao._compat.torchao_prototype` is imported by itself, since it imports torchao.
"""

import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode

from fp4dit_ao._compat.compilation import (
    compile_package,
    compiler_options,
    distinct_sizes,
    is_compiled_copy,
    load_package,
    mark_static,
    sizes_of_repeats,
    types_in_packages,
)  # fmt: skip
from fp4dit_ao._compat.diffusers import (
    after_from_pipe,
    after_from_pretrained,
    before_from_pipe,
    kept_in_float32,
    name_repeated_blocks,
    offloading_hook,
    packed_history,
    progress_bar_config,
    repeated_block_names,
    replace_apply,
    replace_config,
)  # fmt: skip
from fp4dit_ao._compat.graphs import (
    captured_sizes,
    copied,
    copy_calling_convention,
    create_buffer_node,
    exported_graph,
    flat_inputs,
    frozen_sizes,
    input_names,
    is_view,
    size_at,
    size_relations,
    size_text,
    size_with,
    symbol_values,
    symbols_in,
    varying_numbers,
    without_guards,
)  # fmt: skip
from fp4dit_ao._compat.operator_calls import Arguments, Keywords, Operator
from fp4dit_ao._compat.tensors import (
    TensorMeta,
    aliased,
    cpu_multiplies_bfloat16,
    cpu_multiplies_int8,
    fake_like,
    fake_mode,
    fp8_product,
    int8_product,
    is_persistent,
    is_traced,
    is_view_of_another,
    leave_in_data_parallel,
    lerp_,
    make_buffers_persistent,
    make_buffers_transient,
    parse_to,
    prepacked_int8_linear,
    prepacked_linear,
    size_hint,
    slots,
    version,
    without_modes,
    wrapper_tensor,
)  # fmt: skip
from fp4dit_ao._compat.torchao import forget_graphs, parts

__all__ = [
    "Arguments", "FakeTensorMode", "Keywords", "Operator", "TensorMeta", "after_from_pipe", "after_from_pretrained",
    "aliased", "before_from_pipe", "captured_sizes", "compile_package", "compiler_options", "copied",
    "copy_calling_convention",
    "cpu_multiplies_bfloat16", "cpu_multiplies_int8", "create_buffer_node", "distinct_sizes", "exported_graph", "fake_like",
    "fake_mode",
    "flat_inputs", "forget_graphs", "fp8_product", "frozen_sizes", "input_names", "int8_product", "is_compiled_copy",
    "is_persistent", "is_traced", "is_view", "is_view_of_another", "kept_in_float32", "leave_in_data_parallel",
    "lerp_", "load_package", "make_buffers_persistent", "make_buffers_transient", "mark_static",
    "name_repeated_blocks", "offloading_hook", "packed_history", "parse_to", "parts", "prepacked_int8_linear",
    "prepacked_linear", "progress_bar_config", "pytree", "repeated_block_names", "replace_apply", "replace_config",
    "size_at", "size_hint", "size_relations", "size_text", "size_with", "sizes_of_repeats", "slots", "symbol_values",
    "symbols_in", "types_in_packages", "varying_numbers", "version", "without_guards", "without_modes",
    "wrapper_tensor",
]  # fmt: skip
