"""Annotate, convert and lower, pinned on a small DiT block: the rewrite can be read in the test."""

import copy
from dataclasses import replace

import torch
from expecttest import TestCase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, capture, lower, w4a6
from fp4dit_ao.quantizer import ANNOTATION
from tests.graphs import TinyDiT, show, tiny_sample


def annotations(graph: torch.fx.GraphModule) -> str:
    lines = []
    for node in graph.graph.nodes:
        if ANNOTATION in node.meta:
            for source, spec in node.meta[ANNOTATION].input_qspec_map.items():
                if hasattr(spec, "edge_or_node"):
                    text = f"shared with {spec.edge_or_node[1]}"
                else:
                    partial = spec.observer_or_fake_quant_ctr.p
                    fmt = partial.keywords["fmt"]
                    text = f"{partial.func.__name__} {fmt if isinstance(fmt, str) else '/'.join(fmt)}"
                lines.append(f"{source} -> {node}: {text}")
    return "\n".join(lines)


class TestGraphRewrites(TestCase):
    maxDiff = None

    def setUp(self) -> None:
        self.model, self.sample = TinyDiT(), tiny_sample()
        self.captured = capture(self.model, self.sample)
        self.quantizer = FP4DiTQuantizer().set_global(w4a6())

    def converted(self) -> torch.fx.GraphModule:
        prepared = prepare_pt2e(copy.deepcopy(self.captured), self.quantizer)
        return convert_pt2e(prepared)

    def test_captured(self) -> None:
        self.assertExpectedInline(
            show(self.captured),
            """\
pos_embedder_weight = self.pos_embedder.weight
pos_embedder_bias = self.pos_embedder.bias
blocks_0_attn_to_q_weight = self.blocks.0.attn.to_q.weight
blocks_0_attn_to_q_bias = self.blocks.0.attn.to_q.bias
blocks_0_attn_to_k_weight = self.blocks.0.attn.to_k.weight
blocks_0_attn_to_k_bias = self.blocks.0.attn.to_k.bias
blocks_0_attn_to_v_weight = self.blocks.0.attn.to_v.weight
blocks_0_attn_to_v_bias = self.blocks.0.attn.to_v.bias
blocks_0_attn_to_out_weight = self.blocks.0.attn.to_out.weight
blocks_0_attn_to_out_bias = self.blocks.0.attn.to_out.bias
blocks_0_ff_up_weight = self.blocks.0.ff.up.weight
blocks_0_ff_up_bias = self.blocks.0.ff.up.bias
blocks_0_ff_down_weight = self.blocks.0.ff.down.weight
blocks_0_ff_down_bias = self.blocks.0.ff.down.bias
proj_out_weight = self.proj_out.weight
proj_out_bias = self.proj_out.bias
linear = linear(hidden_states, pos_embedder_weight, pos_embedder_bias)
layer_norm = layer_norm(linear, [128], None, None, 1e-05, False)
add = add.Tensor(layer_norm, shift)
linear_1 = linear(add, blocks_0_attn_to_q_weight, blocks_0_attn_to_q_bias)
unflatten = unflatten.int(linear_1, -1, [2, -1])
transpose = transpose.int(unflatten, 1, 2)
linear_2 = linear(add, blocks_0_attn_to_k_weight, blocks_0_attn_to_k_bias)
unflatten_1 = unflatten.int(linear_2, -1, [2, -1])
transpose_1 = transpose.int(unflatten_1, 1, 2)
linear_3 = linear(add, blocks_0_attn_to_v_weight, blocks_0_attn_to_v_bias)
unflatten_2 = unflatten.int(linear_3, -1, [2, -1])
transpose_2 = transpose.int(unflatten_2, 1, 2)
scaled_dot_product_attention = scaled_dot_product_attention(transpose, transpose_1, transpose_2)
transpose_3 = transpose.int(scaled_dot_product_attention, 1, 2)
flatten = flatten.using_ints(transpose_3, 2)
linear_4 = linear(flatten, blocks_0_attn_to_out_weight, blocks_0_attn_to_out_bias)
add_1 = add.Tensor(linear, linear_4)
layer_norm_1 = layer_norm(add_1, [128], None, None, 1e-05, False)
add_2 = add.Tensor(layer_norm_1, shift)
linear_5 = linear(add_2, blocks_0_ff_up_weight, blocks_0_ff_up_bias)
gelu = gelu(linear_5, approximate=tanh)
linear_6 = linear(gelu, blocks_0_ff_down_weight, blocks_0_ff_down_bias)
add_3 = add.Tensor(add_1, linear_6)
linear_7 = linear(add_3, proj_out_weight, proj_out_bias)
return (linear_7,)""",
        )

    def test_annotated(self) -> None:
        graph = self.quantizer.annotate(copy.deepcopy(self.captured))
        self.assertExpectedInline(
            annotations(graph),
            """\
blocks_0_attn_to_q_weight -> linear_1: WeightObserver e2m1
add -> linear_1: TokenActivationObserver e2m3
blocks_0_attn_to_k_weight -> linear_2: WeightObserver e2m1
add -> linear_2: shared with linear_1
blocks_0_attn_to_v_weight -> linear_3: WeightObserver e2m1
add -> linear_3: shared with linear_1
transpose -> scaled_dot_product_attention: TokenActivationObserver e2m3
transpose_1 -> scaled_dot_product_attention: TokenActivationObserver e2m3
transpose_2 -> scaled_dot_product_attention: TokenActivationObserver e2m3
blocks_0_attn_to_out_weight -> linear_4: WeightObserver e2m1
flatten -> linear_4: TokenActivationObserver e2m3
blocks_0_ff_up_weight -> linear_5: WeightObserver e3m0
add_2 -> linear_5: TokenActivationObserver e2m3
blocks_0_ff_down_weight -> linear_6: WeightObserver e2m1
gelu -> linear_6: TokenActivationObserver e2m3""",
        )

    def test_annotated_without_attention_and_gate_format(self) -> None:
        config = replace(w4a6(), attention=None, pre_gelu_weight=None, activation_granularity="tensor")
        graph = FP4DiTQuantizer().set_global(config).annotate(copy.deepcopy(self.captured))
        self.assertExpectedInline(
            annotations(graph),
            """\
blocks_0_attn_to_q_weight -> linear_1: WeightObserver e2m1
add -> linear_1: StaticActivationObserver e2m3
blocks_0_attn_to_k_weight -> linear_2: WeightObserver e2m1
add -> linear_2: shared with linear_1
blocks_0_attn_to_v_weight -> linear_3: WeightObserver e2m1
add -> linear_3: shared with linear_1
blocks_0_attn_to_out_weight -> linear_4: WeightObserver e2m1
flatten -> linear_4: StaticActivationObserver e2m3
blocks_0_ff_up_weight -> linear_5: WeightObserver e2m1
add_2 -> linear_5: StaticActivationObserver e2m3
blocks_0_ff_down_weight -> linear_6: WeightObserver e2m1
gelu -> linear_6: StaticActivationObserver e2m3""",
        )

    def test_prepared(self) -> None:
        prepared = prepare_pt2e(copy.deepcopy(self.captured), self.quantizer)
        self.assertExpectedInline(
            show(prepared),
            """\
pos_embedder_weight = self.pos_embedder.weight
pos_embedder_bias = self.pos_embedder.bias
blocks_0_attn_to_q_weight = self.blocks.0.attn.to_q.weight
activation_post_process_1 = activation_post_process_1(blocks_0_attn_to_q_weight)
blocks_0_attn_to_q_bias = self.blocks.0.attn.to_q.bias
blocks_0_attn_to_k_weight = self.blocks.0.attn.to_k.weight
activation_post_process_2 = activation_post_process_2(blocks_0_attn_to_k_weight)
blocks_0_attn_to_k_bias = self.blocks.0.attn.to_k.bias
blocks_0_attn_to_v_weight = self.blocks.0.attn.to_v.weight
activation_post_process_3 = activation_post_process_3(blocks_0_attn_to_v_weight)
blocks_0_attn_to_v_bias = self.blocks.0.attn.to_v.bias
blocks_0_attn_to_out_weight = self.blocks.0.attn.to_out.weight
activation_post_process_8 = activation_post_process_8(blocks_0_attn_to_out_weight)
blocks_0_attn_to_out_bias = self.blocks.0.attn.to_out.bias
blocks_0_ff_up_weight = self.blocks.0.ff.up.weight
activation_post_process_10 = activation_post_process_10(blocks_0_ff_up_weight)
blocks_0_ff_up_bias = self.blocks.0.ff.up.bias
blocks_0_ff_down_weight = self.blocks.0.ff.down.weight
activation_post_process_12 = activation_post_process_12(blocks_0_ff_down_weight)
blocks_0_ff_down_bias = self.blocks.0.ff.down.bias
proj_out_weight = self.proj_out.weight
proj_out_bias = self.proj_out.bias
linear = linear(hidden_states, pos_embedder_weight, pos_embedder_bias)
layer_norm = layer_norm(linear, [128], None, None, 1e-05, False)
add = add.Tensor(layer_norm, shift)
activation_post_process_0 = activation_post_process_0(add)
linear_1 = linear(activation_post_process_0, activation_post_process_1, blocks_0_attn_to_q_bias)
unflatten = unflatten.int(linear_1, -1, [2, -1])
transpose = transpose.int(unflatten, 1, 2)
activation_post_process_4 = activation_post_process_4(transpose)
linear_2 = linear(activation_post_process_0, activation_post_process_2, blocks_0_attn_to_k_bias)
unflatten_1 = unflatten.int(linear_2, -1, [2, -1])
transpose_1 = transpose.int(unflatten_1, 1, 2)
activation_post_process_5 = activation_post_process_5(transpose_1)
linear_3 = linear(activation_post_process_0, activation_post_process_3, blocks_0_attn_to_v_bias)
unflatten_2 = unflatten.int(linear_3, -1, [2, -1])
transpose_2 = transpose.int(unflatten_2, 1, 2)
activation_post_process_6 = activation_post_process_6(transpose_2)
scaled_dot_product_attention = scaled_dot_product_attention(activation_post_process_4, activation_post_process_5, activation_post_process_6)
transpose_3 = transpose.int(scaled_dot_product_attention, 1, 2)
flatten = flatten.using_ints(transpose_3, 2)
activation_post_process_7 = activation_post_process_7(flatten)
linear_4 = linear(activation_post_process_7, activation_post_process_8, blocks_0_attn_to_out_bias)
add_1 = add.Tensor(linear, linear_4)
layer_norm_1 = layer_norm(add_1, [128], None, None, 1e-05, False)
add_2 = add.Tensor(layer_norm_1, shift)
activation_post_process_9 = activation_post_process_9(add_2)
linear_5 = linear(activation_post_process_9, activation_post_process_10, blocks_0_ff_up_bias)
gelu = gelu(linear_5, approximate=tanh)
activation_post_process_11 = activation_post_process_11(gelu)
linear_6 = linear(activation_post_process_11, activation_post_process_12, blocks_0_ff_down_bias)
add_3 = add.Tensor(add_1, linear_6)
linear_7 = linear(add_3, proj_out_weight, proj_out_bias)
return (linear_7,)""",
        )

    def test_converted(self) -> None:
        self.assertExpectedInline(
            show(self.converted()),
            """\
pos_embedder_weight = self.pos_embedder.weight
pos_embedder_bias = self.pos_embedder.bias
blocks_0_attn_to_q_weight_codes = self.blocks.0.attn.to_q.weight_codes
blocks_0_attn_to_q_weight_scale = self.blocks.0.attn.to_q.weight_scale
dequantize_default = fp4dit_ao.dequantize(blocks_0_attn_to_q_weight_codes, [1, 128], blocks_0_attn_to_q_weight_scale, e2m1, torch.float32)
blocks_0_attn_to_q_bias = self.blocks.0.attn.to_q.bias
blocks_0_attn_to_k_weight_codes = self.blocks.0.attn.to_k.weight_codes
blocks_0_attn_to_k_weight_scale = self.blocks.0.attn.to_k.weight_scale
dequantize_default_1 = fp4dit_ao.dequantize(blocks_0_attn_to_k_weight_codes, [1, 128], blocks_0_attn_to_k_weight_scale, e2m1, torch.float32)
blocks_0_attn_to_k_bias = self.blocks.0.attn.to_k.bias
blocks_0_attn_to_v_weight_codes = self.blocks.0.attn.to_v.weight_codes
blocks_0_attn_to_v_weight_scale = self.blocks.0.attn.to_v.weight_scale
dequantize_default_2 = fp4dit_ao.dequantize(blocks_0_attn_to_v_weight_codes, [1, 128], blocks_0_attn_to_v_weight_scale, e2m1, torch.float32)
blocks_0_attn_to_v_bias = self.blocks.0.attn.to_v.bias
blocks_0_attn_to_out_weight_codes = self.blocks.0.attn.to_out.weight_codes
blocks_0_attn_to_out_weight_scale = self.blocks.0.attn.to_out.weight_scale
dequantize_default_3 = fp4dit_ao.dequantize(blocks_0_attn_to_out_weight_codes, [1, 128], blocks_0_attn_to_out_weight_scale, e2m1, torch.float32)
blocks_0_attn_to_out_bias = self.blocks.0.attn.to_out.bias
blocks_0_ff_up_weight_codes = self.blocks.0.ff.up.weight_codes
blocks_0_ff_up_weight_scale = self.blocks.0.ff.up.weight_scale
dequantize_default_4 = fp4dit_ao.dequantize(blocks_0_ff_up_weight_codes, [1, 128], blocks_0_ff_up_weight_scale, e3m0, torch.float32)
blocks_0_ff_up_bias = self.blocks.0.ff.up.bias
blocks_0_ff_down_weight_codes = self.blocks.0.ff.down.weight_codes
blocks_0_ff_down_weight_scale = self.blocks.0.ff.down.weight_scale
dequantize_default_5 = fp4dit_ao.dequantize(blocks_0_ff_down_weight_codes, [1, 128], blocks_0_ff_down_weight_scale, e2m1, torch.float32)
blocks_0_ff_down_bias = self.blocks.0.ff.down.bias
proj_out_weight = self.proj_out.weight
proj_out_bias = self.proj_out.bias
linear = linear(hidden_states, pos_embedder_weight, pos_embedder_bias)
layer_norm = layer_norm(linear, [128], None, None, 1e-05, False)
add = add.Tensor(layer_norm, shift)
choose_scale_default = fp4dit_ao.choose_scale(add, [1, 1, -1], e2m3, torch.float32)
quantize_default = fp4dit_ao.quantize(add, [1, 1, -1], choose_scale_default, e2m3)
dequantize_default_6 = fp4dit_ao.dequantize(quantize_default, [1, 1, -1], choose_scale_default, e2m3, torch.float32)
linear_1 = linear(dequantize_default_6, dequantize_default, blocks_0_attn_to_q_bias)
unflatten = unflatten.int(linear_1, -1, [2, -1])
transpose = transpose.int(unflatten, 1, 2)
choose_scale_default_1 = fp4dit_ao.choose_scale(transpose, [1, 1, 1, -1], e2m3, torch.float32)
quantize_default_1 = fp4dit_ao.quantize(transpose, [1, 1, 1, -1], choose_scale_default_1, e2m3)
dequantize_default_7 = fp4dit_ao.dequantize(quantize_default_1, [1, 1, 1, -1], choose_scale_default_1, e2m3, torch.float32)
linear_2 = linear(dequantize_default_6, dequantize_default_1, blocks_0_attn_to_k_bias)
unflatten_1 = unflatten.int(linear_2, -1, [2, -1])
transpose_1 = transpose.int(unflatten_1, 1, 2)
choose_scale_default_2 = fp4dit_ao.choose_scale(transpose_1, [1, 1, 1, -1], e2m3, torch.float32)
quantize_default_2 = fp4dit_ao.quantize(transpose_1, [1, 1, 1, -1], choose_scale_default_2, e2m3)
dequantize_default_8 = fp4dit_ao.dequantize(quantize_default_2, [1, 1, 1, -1], choose_scale_default_2, e2m3, torch.float32)
linear_3 = linear(dequantize_default_6, dequantize_default_2, blocks_0_attn_to_v_bias)
unflatten_2 = unflatten.int(linear_3, -1, [2, -1])
transpose_2 = transpose.int(unflatten_2, 1, 2)
choose_scale_default_3 = fp4dit_ao.choose_scale(transpose_2, [1, 1, 1, -1], e2m3, torch.float32)
quantize_default_3 = fp4dit_ao.quantize(transpose_2, [1, 1, 1, -1], choose_scale_default_3, e2m3)
dequantize_default_9 = fp4dit_ao.dequantize(quantize_default_3, [1, 1, 1, -1], choose_scale_default_3, e2m3, torch.float32)
scaled_dot_product_attention = scaled_dot_product_attention(dequantize_default_7, dequantize_default_8, dequantize_default_9)
transpose_3 = transpose.int(scaled_dot_product_attention, 1, 2)
flatten = flatten.using_ints(transpose_3, 2)
choose_scale_default_4 = fp4dit_ao.choose_scale(flatten, [1, 1, -1], e2m3, torch.float32)
quantize_default_4 = fp4dit_ao.quantize(flatten, [1, 1, -1], choose_scale_default_4, e2m3)
dequantize_default_10 = fp4dit_ao.dequantize(quantize_default_4, [1, 1, -1], choose_scale_default_4, e2m3, torch.float32)
linear_4 = linear(dequantize_default_10, dequantize_default_3, blocks_0_attn_to_out_bias)
add_1 = add.Tensor(linear, linear_4)
layer_norm_1 = layer_norm(add_1, [128], None, None, 1e-05, False)
add_2 = add.Tensor(layer_norm_1, shift)
choose_scale_default_5 = fp4dit_ao.choose_scale(add_2, [1, 1, -1], e2m3, torch.float32)
quantize_default_5 = fp4dit_ao.quantize(add_2, [1, 1, -1], choose_scale_default_5, e2m3)
dequantize_default_11 = fp4dit_ao.dequantize(quantize_default_5, [1, 1, -1], choose_scale_default_5, e2m3, torch.float32)
linear_5 = linear(dequantize_default_11, dequantize_default_4, blocks_0_ff_up_bias)
gelu = gelu(linear_5, approximate=tanh)
choose_scale_default_6 = fp4dit_ao.choose_scale(gelu, [1, 1, -1], e2m3, torch.float32)
quantize_default_6 = fp4dit_ao.quantize(gelu, [1, 1, -1], choose_scale_default_6, e2m3)
dequantize_default_12 = fp4dit_ao.dequantize(quantize_default_6, [1, 1, -1], choose_scale_default_6, e2m3, torch.float32)
linear_6 = linear(dequantize_default_12, dequantize_default_5, blocks_0_ff_down_bias)
add_3 = add.Tensor(add_1, linear_6)
linear_7 = linear(add_3, proj_out_weight, proj_out_bias)
return (linear_7,)""",
        )

    def test_lowered(self) -> None:
        self.assertExpectedInline(
            show(lower(self.converted())),
            """\
pos_embedder_weight = self.pos_embedder.weight
pos_embedder_bias = self.pos_embedder.bias
blocks_0_attn_to_q_bias = self.blocks.0.attn.to_q.bias
blocks_0_attn_to_k_bias = self.blocks.0.attn.to_k.bias
blocks_0_attn_to_v_bias = self.blocks.0.attn.to_v.bias
blocks_0_attn_to_out_bias = self.blocks.0.attn.to_out.bias
blocks_0_ff_up_bias = self.blocks.0.ff.up.bias
blocks_0_ff_down_bias = self.blocks.0.ff.down.bias
proj_out_weight = self.proj_out.weight
proj_out_bias = self.proj_out.bias
linear = linear(hidden_states, pos_embedder_weight, pos_embedder_bias)
layer_norm = layer_norm(linear, [128], None, None, 1e-05, False)
add = add.Tensor(layer_norm, shift)
blocks_0_attn_to_q_weight = self.blocks.0.attn.to_q.weight
linear_1 = linear(add, blocks_0_attn_to_q_weight, blocks_0_attn_to_q_bias)
unflatten = unflatten.int(linear_1, -1, [2, -1])
transpose = transpose.int(unflatten, 1, 2)
blocks_0_attn_to_k_weight = self.blocks.0.attn.to_k.weight
linear_2 = linear(add, blocks_0_attn_to_k_weight, blocks_0_attn_to_k_bias)
unflatten_1 = unflatten.int(linear_2, -1, [2, -1])
transpose_1 = transpose.int(unflatten_1, 1, 2)
blocks_0_attn_to_v_weight = self.blocks.0.attn.to_v.weight
linear_3 = linear(add, blocks_0_attn_to_v_weight, blocks_0_attn_to_v_bias)
unflatten_2 = unflatten.int(linear_3, -1, [2, -1])
transpose_2 = transpose.int(unflatten_2, 1, 2)
attention_default = fp4dit_ao.attention(transpose, transpose_1, transpose_2, None, None, e2m3)
transpose_3 = transpose.int(attention_default, 1, 2)
flatten = flatten.using_ints(transpose_3, 2)
blocks_0_attn_to_out_weight = self.blocks.0.attn.to_out.weight
linear_4 = linear(flatten, blocks_0_attn_to_out_weight, blocks_0_attn_to_out_bias)
add_1 = add.Tensor(linear, linear_4)
layer_norm_1 = layer_norm(add_1, [128], None, None, 1e-05, False)
add_2 = add.Tensor(layer_norm_1, shift)
blocks_0_ff_up_weight = self.blocks.0.ff.up.weight
linear_5 = linear(add_2, blocks_0_ff_up_weight, blocks_0_ff_up_bias)
tanh_gelu_default = fp4dit_ao.tanh_gelu(linear_5)
blocks_0_ff_down_weight = self.blocks.0.ff.down.weight
linear_6 = linear(tanh_gelu_default, blocks_0_ff_down_weight, blocks_0_ff_down_bias)
add_3 = add.Tensor(add_1, linear_6)
linear_7 = linear(add_3, proj_out_weight, proj_out_bias)
return (linear_7,)""",
        )
