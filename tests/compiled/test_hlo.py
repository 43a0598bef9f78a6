"""Executions, collectives and FLOPs of compiled programs whose numbers are known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from megalodon_jax.compiled.collectives import Collective, find_collectives
from megalodon_jax.compiled.hlo import Shape, parse_program
from megalodon_jax.compiled.kernels import CompiledKernel, count_estimated_cycles, find_kernels
from megalodon_jax.compiled.matmul_flops import count_matmul_flops
from megalodon_jax.compiled.memory import read_memory

STEPS, B, D = 5, 16, 64


@pytest.fixture(scope="module")
def mesh():
    devices = np.array(jax.devices()[:8]).reshape(2, 4)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def compiled_text(mesh, function, *specs_and_shapes):
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for spec, shape in specs_and_shapes
    ]
    return jax.jit(function).lower(*arguments).compile().as_text()


def sharded(mesh, function, inputs, outputs):
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def test_a_sum_inside_a_scan_counts_every_step(mesh):
    P = PartitionSpec

    def function(x):
        def body(x, _):
            return jax.lax.psum(jnp.sin(x), "model") / 4, None

        return jax.lax.scan(body, x, None, length=STEPS)[0]

    text = compiled_text(mesh, sharded(mesh, function, P("data"), P("data")), (P("data"), (B, D)))
    (found,) = find_collectives(text, mesh)
    assert found == Collective(
        "all-reduce", ("model",), 4, B // 2 * D * 4, STEPS, op_name=found.op_name
    )
    assert found.op_name.endswith("psum")
    assert found.sent_bytes == 2 * 3 / 4 * found.bytes


HALF = B * D * 4 // 2  # bytes of a device's shard of x
KINDS = {
    "all-gather": (lambda x: jax.lax.all_gather(x, "data"), "data", 2 * HALF, HALF),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "model"), "model", HALF, 0.75 * HALF),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "data", 0, 0), "data", HALF, HALF / 2),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "data", [(0, 1)]), "data", HALF, HALF),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_bytes_and_axes(mesh, kind):
    function, axis, whole, sent = KINDS[kind]
    P = PartitionSpec

    def local(x):
        return function(x.reshape(mesh.shape[axis], -1, D))

    text = compiled_text(mesh, sharded(mesh, local, P("data"), P(None)), (P("data"), (B, D)))
    (found,) = find_collectives(text, mesh)
    assert (found.kind, found.axes, found.count) == (kind, (axis,), 1)
    assert (found.bytes, found.sent_bytes) == (whole, sent)


def test_a_collective_over_two_axes(mesh):
    P = PartitionSpec
    text = compiled_text(
        mesh,
        sharded(mesh, lambda x: jax.lax.all_gather(x, ("data", "model")), P("data"), P(None)),
        (P("data"), (B, D)),
    )
    (found,) = find_collectives(text, mesh)
    assert (found.axes, found.group_size) == (("data", "model"), 8)
    assert (found.bytes, found.sent_bytes) == (8 * HALF, 7 * HALF)


def test_flops_of_scanned_products(mesh):
    P = PartitionSpec

    def function(w, x):
        def body(x, w):
            x = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P("data", "model")))
            return jnp.tanh(x), None

        return jax.lax.scan(body, x, w)[0]

    text = compiled_text(
        mesh, function, (P(None, None, "model"), (STEPS, D, D)), (P("data"), (B, D))
    )
    # Each device: half of the rows, a quarter of the columns.
    assert count_matmul_flops(text) == STEPS * 2 * (B // 2) * D * (D // 4)
    kinds = {(found.kind, found.axes, found.count) for found in find_collectives(text, mesh)}
    assert ("all-gather", ("model",), STEPS) in kinds


def test_flops_of_convolutions():
    def function(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2,), "SAME", rhs_dilation=(2,), dimension_numbers=("NHC", "HIO", "NHC")
        )

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 9, 4), (3, 4, 8))]
    compiled = jax.jit(function).lower(*shapes).compile()
    # Outputs at 0, 2, .. 8; taps at -2, 0 and 2, of which the first and last output miss one.
    assert count_matmul_flops(compiled.as_text()) == 2 * (5 * 3 - 2) * 4 * 3 * 8


GROUPS = {
    "{{0,1},{2,3},{4,5},{6,7}}": ("model",),
    "{{0,4},{1,5},{2,6},{3,7}}": ("data",),
    "[4,2]<=[8]": ("model",),
    "[4,2]<=[2,2,2]T(2,1,0)": ("data",),
    "[4,2]<=[2,2,2]T(0,2,1)": ("chunk",),
    "[2,4]<=[8]": ("chunk", "model"),
    "[8,1]<=[8]": (),
    "mesh['data'=2,'chunk'=2,'model'=2] {'data','model'}": ("data", "model"),
    "mesh['a'=8] {'a':(2)2}": ("chunk",),
    "mesh['a'=2,'b'=4] {'a','b':(2)2}": ("data", "model"),
    "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}": ("model",),
    "{}": ("data", "chunk", "model"),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_replica_groups(groups):
    mesh = SimpleNamespace(shape={"data": 2, "chunk": 2, "model": 2})
    text = (
        "ENTRY %main (x: f32[4]) -> f32[4] {\n  %x = f32[4]{0} parameter(0)\n"
        f"  ROOT %y = f32[4]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add\n}}"
    )
    (found,) = find_collectives(text, mesh)
    assert found.axes == GROUPS[groups]
    assert found.group_size == 2 ** len(found.axes)


# Output of libtpu: no trip count, a reduce-scatter as a fusion, a transfer in three steps.
TPU = """
%all-reduce-scatter.1 (input: bf16[8,4]) -> bf16[4,4] {
  %input = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %i = s32[]{:T(128)} constant(0)
  %sum = bf16[8,4]{1,0} all-reduce(%input), replica_groups={{0,1}}, to_apply=%add
  ROOT %part = bf16[4,4]{1,0} dynamic-slice(%sum, %i, %i), dynamic_slice_sizes={4,4}
}

%fused.1 (p: f32[3]) -> (f32[3], f32[6]) {
  %p = f32[3]{0} parameter(0)
  %all-gather.1 = f32[6]{0} all-gather(%p), replica_groups={{0,1}}, frontend_attributes={chain_id="1"}
  ROOT %start = (f32[3]{0}, f32[6]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%fused.2 (p.2: f32[3]) -> f32[6] {
  %p.2 = f32[3]{0} parameter(0)
  %all-gather.2 = f32[6]{0} all-gather(%p.2), replica_groups={{0,1}}, frontend_attributes={chain_id="1"}
  ROOT %done = f32[6]{0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%body (s: (s32[], f32[3], bf16[8,4])) -> (s32[], f32[3], bf16[8,4]) {
  %s = (s32[]{:T(128)}, /*index=1*/f32[3]{0}, bf16[8,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %x = f32[3]{0} get-tuple-element(%s), index=1
  %y = bf16[8,4]{1,0} get-tuple-element(%s), index=2
  %one = s32[] constant(1)
  %more = s32[] add(%n, %one)
  %started = (f32[3]{0}, f32[6]{0}) fusion(%x), kind=kCustom, calls=%fused.1
  %ended = f32[6]{0} fusion(%x), kind=kCustom, calls=%fused.2
  %scattered = bf16[4,4]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="f/g"}
  ROOT %t = (s32[], f32[3]{0}, bf16[8,4]{1,0}) tuple(%more, %x, %y)
}

%condition (c: (s32[], f32[3], bf16[8,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7), backend_config={"flag_configs":["a(\\"b"]}
  %c = (s32[]{:T(128)}, f32[3]{0}, bf16[8,4]{1,0}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

ENTRY %main (a: f32[3], b: bf16[8,4]) -> f32[3] {
  %a = f32[3]{0} parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  %first = s32[] constant(2)
  %init = (s32[], f32[3]{0}, bf16[8,4]{1,0}) tuple(%first, %a, %b)
  %loop = (s32[], f32[3]{0}, bf16[8,4]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[3]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_programs_of_libtpu():
    program = parse_program(TPU)
    assert program.counts["body"] == 5
    assert program.counts["condition"] == 6
    assert program.unknown_loops == ()
    shape = program.computations["all-reduce-scatter.1"]["input"].shapes[0]
    assert shape == Shape("bf16", (8, 4), 1)
    found = find_collectives(program, SimpleNamespace(shape={"data": 2}))
    assert [(one.kind, one.bytes, one.count) for one in found] == [
        ("reduce-scatter", 64, 5),
        ("all-gather", 24, 5),
    ]
    assert found[0].op_name == "f/g"


def test_a_loop_of_unknown_length_is_named():
    text = jax.jit(lambda x: jax.lax.while_loop(lambda x: x[0] < 1, lambda x: x * 2, x))
    program = parse_program(text.lower(jnp.ones(4)).compile().as_text())
    (name,) = program.unknown_loops
    assert "while" in name


def test_no_program():
    with pytest.raises(ValueError, match="no HLO module"):
        parse_program("nothing")


# Cycles as libtpu states them, and kernels as both of Pallas's backends write them.
KERNELS = r"""
%body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %a = f32[] add(%x, %y), backend_config={"estimated_cycles":"10"}
  %k.1 = f32[4,8]{1,0} custom-call(%a), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/cema_outputs/pallas_call"}
}
%condition (c: (s32[])) -> pred[] {
  %c = (s32[]) parameter(0)
  ROOT %lt = pred[] compare(%c, %c), direction=LT
}
ENTRY %main (x: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %w = (s32[]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"8"}}
  %k = f32[2]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/timestep_norm_forward/pallas_call"}, backend_config={"estimated_cycles":"1000","cost_estimate":{"flops":"66"}}
  %other = f32[] custom-call(%x), custom_call_target="Sharding"
  ROOT %f = f32[] fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


def test_kernels_count_with_their_loops():
    assert find_kernels(parse_program(KERNELS)) == [
        CompiledKernel("cema_outputs", "cema", "mosaic_gpu", 8, 0, (Shape("f32", (4, 8)),)),
        CompiledKernel(
            "timestep_norm_forward", "timestep_norm", "pallas_tpu", 1, 66, (Shape("f32", (2,)),)
        ),
    ]


def test_estimated_cycles_count_without_kernels():
    assert count_estimated_cycles(parse_program(KERNELS)) == 8 * 10 + 7


def test_memory_leaves_out_results_in_donated_arguments():
    x = jax.ShapeDtypeStruct((256,), jnp.float32)
    y = jax.ShapeDtypeStruct((64,), jnp.float32)
    function = jax.jit(lambda x, y: (x + 1, 2 * y), donate_argnums=0)
    memory = read_memory(function.lower(x, y).compile())
    assert memory is not None
    assert memory.arguments == 4 * (256 + 64)
    # The second result, and a table of the two results' addresses.
    assert 4 * 64 <= memory.outputs <= 4 * 64 + 2 * 8
    assert memory.total == memory.arguments + memory.outputs + memory.temporaries
