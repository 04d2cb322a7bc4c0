"""Costs read from HLO text, rule by rule on written programs, then on what XLA compiles here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.plan.hlo.count import count_costs, count_turn
from dpo_jax.plan.hlo.text import HOST, HloError, Shape, parse_hlo


def _module(entry, computations="", devices=1):
    """A module whose ENTRY holds the given lines."""
    return f"""HloModule m, is_scheduled=true, num_partitions={devices}

FileNames
1 "a.py"

{computations}
ENTRY %main (p: f32[2]) -> f32[2] {{
{entry}
}}
"""


def _count(entry, computations="", devices=1, **options):
    return count_costs(_module(entry, computations, devices), **options)


DOT = """
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  ROOT %dot = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
"""


def test_a_product_and_its_bytes():
    costs = _count(DOT)
    assert costs.flops == 2 * 8 * 16 * 4
    assert costs.hbm_bytes == 8 * 16 * 2 + 16 * 4 * 2 + 8 * 4 * 4


@pytest.mark.parametrize(
    ("shapes", "attributes", "flops"),
    [
        # a matrix product as TPU has it
        (("bf16[32,64]", "bf16[64,16]", "bf16[32,16]"), "dim_labels=bf_io->bf", 2 * 32 * 64 * 16),
        # a batch of 16 products [512, 128] x [128, 512]: one window position of sixteen holds an input
        (
            ("bf16[512,16,128]", "bf16[128,16,512]", "bf16[16,512,512]"),
            "window={size=16 stride=15 lhs_dilate=16}, dim_labels=b0f_i0o->0bf",
            2 * 16 * 512 * 512 * 128,
        ),
        # the same with the batch padded instead
        (
            ("bf16[4,16,8]", "bf16[8,16,4]", "bf16[4,31,4]"),
            "window={size=16 pad=15_15}, dim_labels=b0f_i0o->b0f",
            2 * 16 * 16 * 4 * 8 * 4,
        ),
        # an image: of 3 x 3 places the border lacks some
        (
            ("f32[2,5,5,3]", "f32[3,3,3,7]", "f32[2,5,5,7]"),
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 2 * (3 * 5 - 2) ** 2 * 3 * 7,
        ),
        (
            ("f32[2,8,4]", "f32[3,2,6]", "f32[2,3,6]"),
            "window={size=3 stride=2 rhs_dilate=1}, dim_labels=b0f_0io->b0f, feature_group_count=2",
            2 * 2 * (3 * 3) * 2 * 6,
        ),
    ],
)
def test_a_convolution_counts_what_meets_an_input(shapes, attributes, flops):
    left, right, out = shapes
    costs = _count(
        f"  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n  ROOT %c = {out} convolution(%a, %b), {attributes}"
    )
    assert costs.flops == flops


RAGGED = "ragged-dot(%%a, %%b, %%g), lhs_contracting_dims={%s}, rhs_contracting_dims={%s}, lhs_ragged_dims={0}%s"


@pytest.mark.parametrize(
    ("right", "out", "attributes"),
    [
        ("f32[4,32,8]", "f32[16,8]", RAGGED % ("1", "1", ", rhs_group_dims={0}")),
        ("f32[16,8]", "f32[4,32,8]", RAGGED % ("0", "0", "")),
    ],
)
def test_a_grouped_product_counts_every_row_once(right, out, attributes):
    lines = f"  %a = f32[16,32] parameter(0)\n  %b = {right} parameter(1)\n  %g = s32[4] parameter(2)\n"
    assert _count(lines + f"  ROOT %r = {out} {attributes}").flops == 2 * 16 * 32 * 8


BODY = """
%body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %t = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %c = s32[] copy(%i)
  %x = f32[8,8]{1,0} get-tuple-element(%t), index=1
  %step = s32[] constant(STEP)
  %next = s32[] add(%c, %step)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,8]{1,0}) tuple(%next, %y)
}

%condition (t: (s32[], f32[8,8])) -> pred[] {
  %t.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %n = s32[] constant(END)
  ROOT %more = pred[] compare(%i.1, %n), direction=DIRECTION
}
"""
LOOP = """
  %x = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(START)
  %t = (s32[], f32[8,8]{1,0}) tuple(%zero, %x)
  %while = (s32[], f32[8,8]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %y = f32[8,8]{1,0} get-tuple-element(%while), index=1
"""


def _loop(start, end, step, direction):
    body = BODY.replace("STEP", str(step)).replace("END", str(end)).replace("DIRECTION", direction)
    return LOOP.replace("START", str(start)), body


@pytest.mark.parametrize(
    ("loop", "trips"),
    [
        ((0, 7, 1, "LT"), 7),
        ((2, 7, 1, "LE"), 6),
        ((0, 7, 3, "LT"), 3),
        ((0, 9, 3, "NE"), 3),
        ((6, 0, -1, "GE"), 7),
        ((6, 0, -2, "GT"), 3),
        ((9, 7, 1, "LT"), 0),
    ],
)
def test_a_loops_body_counts_as_often_as_it_runs(loop, trips):
    costs = _count(*_loop(*loop))
    assert costs.flops == trips * 2 * 8**3
    assert costs.unknown_loops == ()
    assert _count(*_loop(*loop), once=True).flops == 2 * 8**3


@pytest.mark.parametrize("loop", [(0, 7, -1, "LT"), (0, 7, 2, "NE"), (0, 7, 1, "EQ")])
def test_a_loop_that_tells_nothing_is_reported(loop):
    costs = _count(*_loop(*loop))
    assert (costs.flops, costs.unknown_loops) == (2 * 8**3, ("while",))


def test_what_xla_noted_of_a_loop_wins():
    entry, computations = _loop(0, 7, 1, "LT")
    noted = entry.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert _count(noted, computations).flops == 5 * 2 * 8**3


def test_loops_in_loops_multiply():
    entry, computations = _loop(0, 7, 1, "LT")
    outer = computations.replace("%body", "%outer").replace("%condition", "%outer_condition")
    inner = LOOP.replace("START", "0").replace("%x = f32[8,8]{1,0} parameter(0)", "").replace("%t =", "%t2 =")
    inner = inner.replace("while(%t)", "while(%t2)").replace("ROOT %y", "%y")
    product = "  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
    assert product in outer
    nested = computations + outer.replace(product, inner)
    entry = entry.replace("condition=%condition, body=%body", "condition=%outer_condition, body=%outer")
    assert _count(entry, nested).flops == 49 * 2 * 8**3


def test_the_dearest_branch_counts():
    branches = "\n".join(
        f"%{name} (p: f32[8,{k}]) -> f32[8,8] {{\n  %p.{name} = f32[8,{k}]{{1,0}} parameter(0)\n"
        f"  ROOT %d.{name} = f32[8,8]{{1,0}} dot(%p.{name}, %p.{name}), lhs_contracting_dims={{1}}, "
        "rhs_contracting_dims={1}\n}\n"
        for name, k in (("small", 4), ("large", 32))
    )
    entry = (
        "  %i = s32[] parameter(0)\n  %a = f32[8,4]{1,0} parameter(1)\n  %b = f32[8,32]{1,0} parameter(2)\n"
        "  ROOT %c = f32[8,8]{1,0} conditional(%i, %a, %b), branch_computations={%small, %large}"
    )
    assert _count(entry, branches).flops == 2 * 8 * 8 * 32
    old = entry.replace("branch_computations={%small, %large}", "true_computation=%small, false_computation=%large")
    assert _count(old, branches).flops == 2 * 8 * 8 * 32


def test_only_what_lies_in_hbm_counts_and_copies_of_it_once():
    costs = _count("""
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %copy-start = (bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %view = bf16[8192]{0:T(1024)S(1)} bitcast(%copy-done)
  %exp = bf16[8192]{0:T(1024)S(1)} exponential(%view)
  ROOT %out = bf16[8192]{0:T(1024)S(5)} copy(%exp)""")
    # On the chip: the copy's end, exp's operand and result, the last copy's operand.
    array = 64 * 128 * 2
    assert (costs.hbm_bytes, costs.read[1] + costs.written[1]) == (array, 4 * array)
    assert (costs.read[HOST], costs.written[HOST]) == (0, array)


def test_memory_is_padded_to_tiles():
    shape = Shape("bf16", (3, 100, 5), "1,2,0:T(8,128)(2,1)")
    assert (shape.bytes, shape.stored_bytes) == (3 * 100 * 5 * 2, 3 * 128 * 8 * 2)
    assert Shape("f32", (), ":T(128)S(6)").stored_bytes == 4
    assert Shape("f32", (), ":T(128)S(6)").space == 6
    assert Shape("s4", (3,), "0").bytes == 2


def test_slices_and_updates_in_place_count_their_part():
    costs = _count("""
  %a = f32[100,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %part = f32[1,8]{1,0} dynamic-slice(%a, %i, %z), dynamic_slice_sizes={1,8}
  ROOT %d = f32[100,8]{1,0} dynamic-update-slice(%a, %u, %i, %z)""")
    assert costs.hbm_bytes == (32 + 32 + 4 + 4) + (32 + 32 + 4 + 4)


def test_a_fusion_counts_its_slices_and_updates_also_through_fusions_in_it():
    computations = """
%cut (s: f32[100,8], j: s32[]) -> f32[8] {
  %s = f32[100,8]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %z0 = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%s, %j, %z0), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%row)
}

%fused (p0: f32[100,8], p1: f32[50,8], p2: s32[]) -> (f32[50,8], f32[8]) {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = f32[50,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %z1 = s32[] constant(0)
  %taken = f32[8]{0} fusion(%p0, %p2), kind=kLoop, calls=%cut
  %twice = f32[8]{0} add(%taken, %taken)
  %shaped = f32[1,8]{1,0} bitcast(%twice)
  %put = f32[50,8]{1,0} dynamic-update-slice(%p1, %shaped, %p2, %z1)
  ROOT %both = (f32[50,8]{1,0}, f32[8]{0}) tuple(%put, %twice)
}
"""
    costs = _count(
        """
  %a = f32[100,8]{1,0} parameter(0)
  %b = f32[50,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = (f32[50,8]{1,0}, f32[8]{0}) fusion(%a, %b, %i), kind=kLoop, calls=%fused""",
        computations,
    )
    assert costs.hbm_bytes == 32 + 0 + 4 + 32 + 32


COLLECTIVES = [
    ("f32[4,8]", "f32[16,8]", "all-gather", "replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 512, 384),
    ("f32[16,8]", "f32[4,8]", "reduce-scatter", "replica_groups=[2,4]<=[8], dimensions={0}", 512, 384),
    ("bf16[16,8]", "bf16[16,8]", "all-reduce", "replica_groups=mesh['a'=2,'b'=4] {'b'}", 256, 384),
    ("bf16[16,8]", "bf16[16,8]", "all-to-all", "replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 256, 192),
]


@pytest.mark.parametrize(("given", "out", "kind", "attributes", "payload", "received"), COLLECTIVES)
def test_collectives(given, out, kind, attributes, payload, received):
    lines = f"  %a = {given}{{1,0}} parameter(0)\n  ROOT %c = {out}{{1,0}} {kind}(%a), channel_id=1, {attributes}"
    (collective,) = _count(lines, devices=8).collectives
    assert (collective.kind, collective.payload_bytes, collective.received_bytes) == (kind, payload, received)
    assert collective.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert (collective.group_size, collective.times, collective.asynchronous) == (4, 1, False)


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['a'=8,'b'=1], device_ids=([4,2]T(1,0)) {'a','b'}", ((0, 2, 4, 6, 1, 3, 5, 7),)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups={}", (tuple(range(8)),)),
    ],
)
def test_groups_in_every_form(attributes, groups):
    lines = f"  %a = f32[16] parameter(0)\n  ROOT %c = f32[16] all-reduce(%a), {attributes}, to_apply=%add"
    assert _count(lines, devices=8).collectives[0].groups == groups


def test_an_asynchronous_collective_counts_once():
    costs = _count(
        """
  %a = f32[4,8]{1,0} parameter(0)
  %s = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%a), replica_groups={{0,1},{2,3}}, dimensions={0}
  %d = f32[8,8]{1,0} all-gather-done(%s)
  %p = (f32[8,8]{1,0}, f32[8,8]{1,0}, u32[], u32[]) collective-permute-start(%d), source_target_pairs={{0,1},{1,0}}
  ROOT %q = f32[8,8]{1,0} collective-permute-done(%p)""",
        devices=4,
    )
    gather, permute = costs.collectives
    assert (gather.payload_bytes, gather.received_bytes, gather.asynchronous) == (256, 128, True)
    assert (permute.payload_bytes, permute.received_bytes, permute.groups) == (256, 256, ((0, 1), (1, 0)))
    assert costs.hbm_bytes == 128 + 256 + 256 + 256


def test_an_asynchronous_slice_counts_what_it_takes():
    costs = _count("""
  %a = f32[100]{0} parameter(0)
  %s = ((f32[100]{0}), f32[10]{0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:10]}
  ROOT %d = f32[10]{0:S(1)} slice-done(%s)""")
    assert costs.hbm_bytes == 40


def test_a_fused_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    fused = """
%all-reduce-scatter (p: f32[16,8]) -> f32[4,8] {
  %p.1 = f32[16,8]{1,0} parameter(0)
  %all-reduce = f32[16,8]{1,0} all-reduce(%p.1), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  %id = u32[] partition-id()
  ROOT %slice = f32[4,8]{1,0} dynamic-slice(%all-reduce, %id, %zero), dynamic_slice_sizes={4,8}
}
"""
    call = "  %a = f32[16,8]{1,0} parameter(0)\n"
    call += "  ROOT %f = f32[4,8]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter"
    costs = _count(call + ', metadata={op_name="grad"}', fused, devices=4)
    (collective,) = costs.collectives
    assert (collective.kind, collective.payload_bytes, collective.received_bytes, collective.op_name) == (
        "reduce-scatter",
        512,
        384,
        "grad",
    )
    assert costs.hbm_bytes == 512 + 128


@pytest.mark.parametrize(
    ("kind", "target", "slices", "payload", "received"),
    [
        ("ALL_REDUCE", "{1,2}x{0:3}", 2, 64, 2 * 32),
        ("ALL_REDUCE", "{1:4}x{0:3}", 4, 64, 2 * 48),
        ("REDUCE_SCATTER", "{1,2,3,4}x{0:3}", 4, 64, 48),
        ("ALL_GATHER", "{1,2}x{0:3}", 2, 128, 64),
    ],
)
def test_what_is_sent_to_other_slices_is_a_collective(kind, target, slices, payload, received):
    """As TPU compilers write it: sent to the runtime of the host, which gives the result back."""
    attributes = (
        "channel_id=2, is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_megascale_target="{target}",_xla_megascale_transfer_type="{kind}"}}'
    )
    costs = _count(f"""
  %p = f32[2,8]{{1,0}} parameter(0)
  %t = token[] after-all()
  %send.1 = (f32[2,8]{{1,0}}, u32[], token[]) send(%p, %t), {attributes}
  %recv.1 = (f32[2,8]{{1,0}}, u32[], token[]) recv(%t), {attributes}
  %send-done.1 = token[] send-done(%send.1), channel_id=2, is_host_transfer=true
  ROOT %recv-done.1 = (f32[2,8]{{1,0}}, token[]) recv-done(%recv.1), channel_id=2, is_host_transfer=true
""")
    (collective,) = costs.collectives
    assert (collective.kind, collective.slices, collective.group_size) == (
        kind.lower().replace("_", "-"),
        slices,
        slices,
    )
    assert (collective.payload_bytes, collective.received_bytes) == (payload, received)
    with pytest.raises(HloError, match="a transfer between slices that is not known"):
        _count(f"""
  %p = f32[2,8]{{1,0}} parameter(0)
  %t = token[] after-all()
  ROOT %send.1 = (f32[2,8]{{1,0}}, u32[], token[]) send(%p, %t), {attributes.replace(kind, "NEW")}
""")


def test_an_asynchronous_computation_is_followed():
    inside = """
%wrapped (p: f32[16,8]) -> f32[4,8] {
  %p.1 = f32[16,8]{1,0} parameter(0)
  ROOT %rs = f32[4,8]{1,0} reduce-scatter(%p.1), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
}
"""
    costs = _count(
        """
  %a = f32[16,8]{1,0} parameter(0)
  %s = ((f32[16,8]{1,0}), f32[4,8]{1,0}, s32[]) async-start(%a), calls=%wrapped
  %u = ((f32[16,8]{1,0}), f32[4,8]{1,0}, s32[]) async-update(%s)
  ROOT %d = f32[4,8]{1,0} async-done(%u)""",
        inside,
        devices=4,
    )
    (collective,) = costs.collectives
    assert (collective.kind, collective.payload_bytes, collective.group_size, collective.asynchronous) == (
        "reduce-scatter",
        512,
        4,
        True,
    )
    assert costs.hbm_bytes == 512 + 128


def test_a_turn_of_the_loop_that_nobody_knows_is_apart_from_the_rest():
    """A known loop inside it counts whole; an unknown one inside it once, and is named."""
    turn, rest = count_turn(_module(LOOP_AND_DOT, _loop(0, 7, 1, "LT")[1] + ONE_MORE))
    assert (turn.flops, rest.flops) == (7 * 2 * 8**3, 2 * 8**3)
    assert turn.unknown_loops == rest.unknown_loops == ()
    assert turn.hbm_bytes > 7 * 3 * 8 * 8 * 4
    turn, rest = count_turn(_module(LOOP_AND_DOT, _loop(0, 7, 1, "EQ")[1] + ONE_MORE))
    assert (turn.flops, rest.flops, turn.unknown_loops) == (2 * 8**3, 2 * 8**3, ("inner",))
    turn, rest = count_turn(_module(*_loop(0, 7, 1, "LT")))
    assert (turn.flops, rest.flops) == (0, 7 * 2 * 8**3)


ONE_MORE = """
%outer_body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %t = (s32[], f32[8,8]{1,0}) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%t), index=1
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,8]{1,0}) tuple(%zero, %x)
  ROOT %inner = (s32[], f32[8,8]{1,0}) while(%start), condition=%condition, body=%body
}

%outer_condition (t: (s32[], f32[8,8])) -> pred[] {
  %t = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %odd = pred[] is-finite(%i)
}
"""
LOOP_AND_DOT = """
  %x = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8,8]{1,0}) tuple(%zero, %x)
  %while = (s32[], f32[8,8]{1,0}) while(%t), condition=%outer_condition, body=%outer_body
  %y = f32[8,8]{1,0} get-tuple-element(%while), index=1
  ROOT %z = f32[8,8]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
"""


@pytest.mark.parametrize("fused", [True, False])
def test_a_scatter_updates_in_place(fused):
    """Of what it updates, what is updated is read and written, no more; its indices and updates are read."""
    lines = """
  %p = f32[64,8]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  %u = f32[4,8]{1,0} parameter(2)
  ROOT %s = f32[64,8]{1,0} scatter(%p, %i, %u), update_window_dims={1}, to_apply=%add
"""
    call = lines[: lines.index("  ROOT")] + "  ROOT %f = f32[64,8]{1,0} fusion(%p, %i, %u), calls=%inside"
    inside = f"%inside (p: f32[64,8]) -> f32[64,8] {{{lines}}}\n"
    costs = _count(call, inside) if fused else _count(lines)
    assert costs.hbm_bytes == 3 * 4 * 8 * 4 + 4 * 4
    # What is written elsewhere than where it comes from is written whole.
    fresh = inside.replace(
        "%p = f32[64,8]{1,0} parameter(0)", "%q = f32[] parameter(0)\n  %p = f32[64,8]{1,0} broadcast(%q)"
    )
    call = call.replace("%p = f32[64,8]{1,0}", "%p = f32[]")
    assert _count(call, fresh).hbm_bytes == 64 * 8 * 4 + 4 * 8 * 4 + 4 * 4 + 4


def test_a_copy_inside_a_fusion_is_another_name():
    """TPU writes one where int8 arrays of a loop have tiles of another height: of what it copies a slice is read."""
    inside = """
%inside (p: s8[32,64,128], i: s32[]) -> s8[1,64,128] {
  %p.1 = s8[32,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %tiles = s8[32,64,128]{2,1,0:T(8,128)(4,1)} copy(%p.1)
  ROOT %one = s8[1,64,128]{2,1,0} dynamic-slice(%tiles, %i.1, %zero, %zero), dynamic_slice_sizes={1,64,128}
}
"""
    lines = """
  %p = s8[32,64,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = s8[1,64,128]{2,1,0} fusion(%p, %i), kind=kLoop, calls=%inside
"""
    assert _count(lines, inside).hbm_bytes == 2 * 64 * 128 + 4


KERNEL = """
  %a = bf16[8,128]{1,0} parameter(0)
  %k = bf16[8,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": "{\\"q\\": 128}"
}}, metadata={op_name="jit(f)/vmap(g)/my_kernel/pallas_call"}, backend_config={"custom_call_config":{"body":"e30="COST}}
  ROOT %b = bf16[8,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"
"""


def test_a_kernel_counts_by_the_callers_formula():
    seen = []

    def formula(call):
        seen.append(call)
        return 2.0 * call.operands[0].elements

    costs = _count(KERNEL.replace("COST", ""), kernel_flops=formula)
    assert (costs.kernel_flops, costs.kernels, costs.unknown_kernels) == (2048, {"my_kernel": 1}, ())
    assert (seen[0].name, seen[0].target, seen[0].cost_estimate) == ("my_kernel", "tpu_custom_call", None)
    assert seen[0].results[0].dims == (8, 128)
    assert costs.hbm_bytes == 2 * 8 * 128 * 2


def test_a_kernel_that_is_not_known_is_reported():
    assert _count(KERNEL.replace("COST", "")).unknown_kernels == ("my_kernel",)
    stated = ',"cost_estimate":{"flops":"77","transcendentals":"0"}'
    assert _count(KERNEL.replace("COST", stated)).kernel_flops == 77


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("  %a = f32[2] parameter(0)\n  %b = what is this", "line 9: no shape"),
        ("  %a = f32[2] 7", "line 8: no opcode"),
        ("  what is this", "line 8: not an instruction"),
        ("  %a = f32[2] negate(%gone)", "line 8: operand gone is not in its computation"),
        ("  %a = f32[2] fusion(), kind=kLoop, calls=%gone", "line 8: no computation 'gone'"),
        ("  %a = f99[2] parameter(0)\n  %b = f99[2] negate(%a)", "dtype 'f99' is not known"),
        ("  %a = f32[2] parameter(0)\n  %b = f32[2] all-reduce(%a), replica_groups=<new>", "replica_groups in a form"),
        ("  %a = f32[2] parameter(0), sharding={{", "line 8: its braces are never closed"),
    ],
)
def test_what_is_not_understood_is_an_error_with_its_line(lines, said):
    with pytest.raises(HloError, match=said):
        _count(lines)


def test_text_that_is_no_hlo():
    with pytest.raises(HloError, match="HLO line 1: neither a computation nor a known section: module"):
        parse_hlo("module @jit_f {\n}")
    with pytest.raises(HloError, match="no ENTRY"):
        parse_hlo("HloModule m\n")


def _compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def _scan(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_a_compiled_scan_and_its_gradient():
    x, w = jnp.ones((64, 128)), jnp.ones((7, 128, 128))
    costs = count_costs(_compiled(_scan, x, w).as_text())
    assert (costs.flops, costs.unknown_loops, costs.unknown_kernels) == (7 * 2 * 64 * 128 * 128, (), ())
    step = jax.checkpoint(lambda x, w: (jnp.tanh(jnp.sin(x @ w) @ w), None), prevent_cse=False)
    loss = lambda w: jax.lax.scan(step, x, w)[0].sum()
    # forward 2 products a layer; backward again the first (the second's result is not needed), and 2 a product
    costs = count_costs(_compiled(jax.grad(loss), w).as_text())
    assert costs.flops == pytest.approx(7 * (2 + 2 + 4) * 2 * 64 * 128 * 128)


def test_compiled_collectives_on_eight_devices():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    put = lambda shape, spec: jax.device_put(np.ones(shape, np.float32), jax.NamedSharding(mesh, spec))
    x, w, v = put((64, 256), jax.P("a")), put((256, 512), jax.P(None, "b")), put((512, 256), jax.P("b"))
    costs = count_costs(_compiled(lambda x, w, v: jnp.tanh(x @ w) @ v, x, w, v).as_text())
    assert costs.flops == 2 * 2 * 64 * 256 * 512 / 8
    (collective,) = costs.collectives
    assert (collective.kind, collective.payload_bytes, collective.groups) == (
        "all-reduce",
        32 * 256 * 4,
        ((0, 1, 2, 3), (4, 5, 6, 7)),
    )
