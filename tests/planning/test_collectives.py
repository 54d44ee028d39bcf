"""Bytes of collectives in the text of a program."""

import pytest

from sophia_levanter.planning.collectives import collective_bytes

# A loop as TPU's compiler writes it, which turns (8 - 0) / 2 = 4 times, inside of one that says that it turns 3 times.
LOOPS = """\
HloModule jit_step, is_scheduled=true

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
  %sent.2 = (bf16[16,4]{1,0:T(8,128)(2,1)}, bf16[16,4], u32[], /*index=3*/u32[]{:S(2)}) collective-permute-start(%x.2)
  %got.2 = bf16[16,4]{1,0:T(8,128)(2,1)S(3)} collective-permute-done(%sent.2)
  ROOT %tuple.2 = (u32[]{:T(128)}, bf16[16,4]{1,0:T(8,128)(2,1)S(3)}) tuple(%next.2, %got.2)
}

%outer_body (param.4: (s32[], bf16[16,4])) -> (s32[], bf16[16,4]) {
  %param.4 = (s32[], bf16[16,4]) parameter(0)
  %start.4 = (u32[], bf16[16,4]) tuple(%param.4, %param.4)
  %inner = (u32[], bf16[16,4]) while(%start.4), condition=%inner_condition, body=%inner_body
  %x.4 = bf16[16,4] get-tuple-element(%inner), index=1
  %whole.4 = (bf16[16,4], bf16[32,4]) all-gather-start(%x.4), replica_groups={{0,1}}, dimensions={0}
  %whole_done.4 = bf16[32,4] all-gather-done(%whole.4)
  %part.4 = bf16[8,4] reduce-scatter(%x.4), to_apply=%add
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
        "all-gather": 3 * (32 * 4 * 2),
        "reduce-scatter": 3 * (16 * 4 * 2),
        "all-reduce": 2 * 6 * 4,
    }


def test_a_loop_that_does_not_say_how_often_it_turns():
    hlo = LOOPS.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="how often the loop inner_body turns cannot be told"):
        collective_bytes(hlo)


# As v5e's compiler writes them: a gather in three parts, which each have the whole; a sum that a slice is taken of; a
# sum whose operand is narrowed on the way.
TPU = """\
HloModule jit_step, is_scheduled=true

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
    assert collective_bytes(TPU) == {"all-gather": 128 * 4 * 2, "reduce-scatter": 128 * 4 * 2, "all-reduce": 2 * 6 * 2}
