"""Bytes of collectives in the text of a program."""

import pytest

from sophia_levanter.planning.collectives import _groups, collective_bytes

# A loop as TPU's compiler writes it, which turns (8 - 0) / 2 = 4 times, inside of one that says that it turns 3 times.
LOOPS = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_condition (param.1: (u32[], bf16[16,4])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(8), metadata={op_name="a/constant(5)"}
  %param.1 = (u32[]{:T(128)}, bf16[16,4]{1,0:T(8,128)(2,1)S(3)}) parameter(0)
  %counter.1 = u32[]{:T(128)} get-tuple-element(%param.1), index=0
  ROOT %compare.1 = pred[]{:T(512)} compare(%counter.1, %constant.1), direction=LT
}

%inner_body (param.2: (u32[], bf16[16,4])) -> (u32[], bf16[16,4]) {
  %param.2 = (u32[]{:T(128)}, bf16[16,4]{1,0:T(8,128)(2,1)S(3)}) parameter(0)
  %counter.2 = u32[]{:T(128)} get-tuple-element(%param.2), index=0
  %constant.2 = u32[]{:T(128)} constant(2)
  %next.2 = u32[]{:T(128)} add(%counter.2, %constant.2)
  %x.2 = bf16[16,4]{1,0:T(8,128)(2,1)S(3)} get-tuple-element(%param.2), index=1
  %put.2 = (bf16[16,4], bf16[16,4], /*index=2*/u32[]{:S(2)}) collective-permute-start(%x.2), source_target_pairs={{1,2}}
  %got.2 = bf16[16,4]{1,0:T(8,128)(2,1)S(3)} collective-permute-done(%put.2)
  ROOT %tuple.2 = (u32[]{:T(128)}, bf16[16,4]{1,0:T(8,128)(2,1)S(3)}) tuple(%next.2, %got.2)
}

%outer_body (param.4: (s32[], bf16[16,4])) -> (s32[], bf16[16,4]) {
  %param.4 = (s32[], bf16[16,4]) parameter(0)
  %start.4 = (u32[], bf16[16,4]) tuple(%param.4, %param.4)
  %inner = (u32[], bf16[16,4]) while(%start.4), condition=%inner_condition, body=%inner_body
  %x.4 = bf16[16,4] get-tuple-element(%inner), index=1
  %whole.4 = (bf16[16,4], bf16[32,4]) all-gather-start(%x.4), replica_groups={{0,1},{2,3}}, dimensions={0}
  %whole_done.4 = bf16[32,4] all-gather-done(%whole.4)
  %part.4 = bf16[8,4] reduce-scatter(%x.4), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  ROOT %tuple.4 = (s32[], bf16[16,4]) tuple(%param.4, %x.4)
}

%fused (p: f32[6]) -> f32[6] {
  %p = f32[6] parameter(0)
  ROOT %reduced = f32[6] all-reduce(%p), to_apply=%add
}

ENTRY %main (a: (s32[], bf16[16,4]), b: f32[6]) -> f32[6] {
  %a = (s32[], bf16[16,4]) parameter(0)
  %b = f32[6] parameter(1)
  %outer = (s32[], bf16[16,4]) while(%a), body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %fusion = f32[6] fusion(%b), kind=kCustom, calls=%fused
}
"""


def test_loops_count_as_often_as_they_turn():
    assert collective_bytes(LOOPS) == {
        "collective-permute": 3 * 4 * (16 * 4 * 2),
        "all-gather": 3 * (32 * 4 * 2) / 2,
        "reduce-scatter": 3 * (16 * 4 * 2) / 2,
        "all-reduce": 2 * 6 * 4 * 3 / 4,
    }


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        # The gathers are of devices 0 and 1, and of 2 and 3; the scatters of 0 and 2, and of 1 and 3.
        ([0, 0, 1, 1], {"collective-permute": 1536, "reduce-scatter": 192, "all-reduce": 12}),
        ([0, 1, 0, 1], {"collective-permute": 1536, "all-gather": 384, "all-reduce": 12}),
        ([0, 0, 0, 0], {}),
    ],
)
def test_what_goes_to_other_nodes(nodes, wanted):
    assert collective_bytes(LOOPS, nodes) == wanted


# Of 96 bytes on eight devices.
@pytest.mark.parametrize(
    ("kind", "sent", "to_other_nodes"),
    [
        ("all-gather", 84, 12),
        ("reduce-scatter", 84, 12),
        ("all-reduce", 168, 24),
        ("all-to-all", 84, 48),
        ("collective-permute", 96, 96),
    ],
)
def test_a_ring_over_two_nodes(kind, sent, to_other_nodes):
    hlo = f"""\
HloModule jit_step, num_partitions=8

ENTRY %main (a: f32[24]) -> f32[24] {{
  %a = f32[24] parameter(0)
  ROOT %sent = f32[24] {kind}(%a), replica_groups={{}}
}}
"""
    assert collective_bytes(hlo) == {kind: sent}
    assert collective_bytes(hlo, 4 * [0] + 4 * [1]) == {kind: to_other_nodes}
    assert collective_bytes(hlo.replace("num_partitions=8", "num_partitions=1")) == {}


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,3},{1,2}}", [[0, 3], [1, 2]]),
        ("{}", [list(range(8))]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'a','b'}", [list(range(8))]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_how_groups_are_written(written, groups):
    assert _groups(f"f32[4] all-reduce(%a), channel_id=1, replica_groups={written}, to_apply=%add", range(8)) == groups


def test_a_loop_that_does_not_say_how_often_it_turns():
    hlo = LOOPS.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="cannot determine the number of iterations of the loop inner_body"):
        collective_bytes(hlo)


def test_groups_in_an_unknown_form():
    hlo = LOOPS.replace("replica_groups=[2,2]<=", "replica_groups=@2")
    with pytest.raises(ValueError, match="cannot determine which devices participate in a collective"):
        collective_bytes(hlo)


# As v5e's compiler writes them: a gather in three parts, which each have the whole; a sum that a slice is taken of; a
# sum whose operand is narrowed on the way.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%fused_computation.1 (p.1: bf16[16,4]) -> (bf16[16,4], bf16[128,4], u32[]) {
  %p.1 = bf16[16,4] parameter(0)
  %all-gather.1 = bf16[128,4] all-gather(%p.1), dimensions={0}
  ROOT %tuple.1 = (bf16[16,4], bf16[128,4], u32[]) tuple(%p.1, %all-gather.1)
}

%async_collective_fusion.1 (p.2: bf16[16,4]) -> (bf16[16,4], bf16[128,4], u32[]) {
  %p.2 = bf16[16,4] parameter(0)
  %all-gather.2 = bf16[128,4] all-gather(%p.2), dimensions={0}
  ROOT %tuple.2 = (bf16[16,4], bf16[128,4], u32[]) tuple(%p.2, %all-gather.2)
}

%fused_computation.3 (p.3: bf16[16,4]) -> bf16[128,4] {
  %p.3 = bf16[16,4] parameter(0)
  ROOT %all-gather.3 = bf16[128,4] all-gather(%p.3), dimensions={0}
}

%all-reduce-scatter.1 (input: bf16[120,4]) -> bf16[16,4] {
  %input = bf16[120,4] parameter(0)
  %zero = bf16[] constant(0)
  %padded = bf16[128,4] pad(%input, %zero), padding=0_8x0_0
  %all-reduce.4 = bf16[128,4] all-reduce(%padded), to_apply=%add
  ROOT %slice.4 = bf16[16,4] dynamic-slice(%all-reduce.4, %zero, %zero), dynamic_slice_sizes={16,4}
}

ENTRY %main (a: bf16[16,4], b: bf16[120,4], c: f32[6]) -> bf16[6] {
  %a = bf16[16,4] parameter(0)
  %b = bf16[120,4] parameter(1)
  %c = f32[6] parameter(2)
  %async-collective-start = (bf16[16,4], bf16[128,4], u32[]) fusion(%a), kind=kCustom, calls=%fused_computation.1
  %fusion.2 = (bf16[16,4], bf16[128,4], u32[]) fusion(%a), kind=kCustom, calls=%async_collective_fusion.1
  %async-collective-done = bf16[128,4] fusion(%a), kind=kCustom, calls=%fused_computation.3
  %scattered = bf16[16,4] fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %narrowed = bf16[6] all-reduce(%c), to_apply=%add
}
"""


def test_what_tpus_write_in_parts_counts_once():
    whole = 128 * 4 * 2
    assert collective_bytes(TPU) == {
        "all-gather": whole * 7 / 8,
        "reduce-scatter": whole * 7 / 8,
        "all-reduce": 2 * 6 * 2 * 7 / 8,
    }


def test_a_step_takes_one_branch_of_a_conditional():
    """The one that sends the most, whichever it is."""
    branch = """\
%{kind} (p.{size}: f32[24]) -> f32[24] {{
  %p.{size} = f32[24] parameter(0)
  ROOT %sent.{size} = f32[24] {kind}(%p.{size}), replica_groups={{}}
}}
"""
    kinds = ["all-to-all", "all-reduce", "all-gather"]
    branches = "\n".join(branch.format(kind=kind, size=size) for size, kind in enumerate(kinds))
    hlo = f"""\
HloModule jit_step, num_partitions=8

{branches}
ENTRY %main (i: s32[], a: f32[24]) -> f32[24] {{
  %i = s32[] parameter(0)
  %a = f32[24] parameter(1)
  ROOT %chosen = f32[24] conditional(%i, %a, %a, %a), branch_computations={{{", ".join(f"%{kind}" for kind in kinds)}}}
}}
"""
    assert collective_bytes(hlo) == {"all-reduce": 168}


# Of 96 bytes on a device of three slices.
@pytest.mark.parametrize(
    ("written", "kind", "sent"),
    [
        ("ALL_REDUCE", "all-reduce", 128),
        ("REDUCE_SCATTER", "reduce-scatter", 64),
        ("ALL_GATHER", "all-gather", 192),
        ("ALL_TO_ALL", "all-to-all", 64),
        ("ONE_TO_ONE", "collective-permute", 96),
    ],
)
@pytest.mark.parametrize("slices", ["1,2,3", "1:3"])
def test_what_hosts_transfer_to_other_slices(written, kind, sent, slices):
    hlo = f"""\
HloModule jit_step, num_partitions=12

ENTRY %main (a: f32[24]) -> f32[24] {{
  %a = f32[24] parameter(0)
  %token = token[] after-all()
  %send = (f32[24], u32[], token[]) send(%a, %token), channel_id=1, is_host_transfer=true, frontend_attributes={{\
_xla_megascale_target="{{{slices}}}x{{0:3}}",_xla_megascale_transfer_type="{written}"}}
  ROOT %sent = token[] send-done(%send), channel_id=1, is_host_transfer=true
}}
"""
    for nodes in (None, 4 * [0] + 4 * [1] + 4 * [2]):
        assert collective_bytes(hlo, nodes) == pytest.approx({kind: sent})
    with pytest.raises(ValueError, match="cannot determine which slices participate in a collective"):
        collective_bytes(hlo.replace(written, "SOMETHING"))


def test_what_a_host_transfers_otherwise_is_not_counted():
    entry = "ENTRY %main (a: f32[24]) -> token[] {\n  %a = f32[24] parameter(0)\n  ROOT %sent = token[] send(%a)\n}\n"
    hlo = f"HloModule jit_step, num_partitions=8\n\n{entry}"
    assert collective_bytes(hlo) == {}
