"""Reading collectives out of a compiled program: loops, and one collective that is written in several pieces."""

import pytest

from memopt._collectives import Collective, collectives, totals

PROGRAM = """HloModule jit_step, is_scheduled=true

%cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%piece (q: f32[8]) -> f32[64] {
  %q = f32[8]{0} parameter(0)
  ROOT %all-gather.2 = f32[64]{0} all-gather(%q), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="1"}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %moved = f32[8]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %fused = f32[64]{0} fusion(%x), kind=kCustom, calls=%piece
  ROOT %t = (s32[]{:T(128)}, f32[8]{0}) tuple(%counter, %moved)
}

%start (q: f32[8]) -> f32[64] {
  %q = f32[8]{0} parameter(0)
  ROOT %all-gather.1 = f32[64]{0} all-gather(%q), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="1"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %begun = f32[64]{0} fusion(%a), kind=kCustom, calls=%start
  %t = (s32[]{:T(128)}, f32[8]{0}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, f32[8]{0}) while(%t), condition=%cond, body=%body
  ROOT %r = f32[8]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_loop_runs_as_often_as_its_condition_says():
    moved = next(one for one in collectives(PROGRAM) if one.kind == "collective-permute")
    assert moved.times == 5 and moved.sent_bytes == 5 * 32


def test_the_pieces_of_one_collective_are_one():
    assert totals(collectives(PROGRAM))["all-gather"] == (1, 64 * 4 * 7 // 8)


def test_what_the_compiler_says_of_a_loop_comes_first():
    told = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert next(one for one in collectives(told) if one.kind == "collective-permute").times == 9


@pytest.mark.tpu_aot
def test_seconds_go_by_the_links_that_a_group_of_devices_spans():
    one = Collective("all-gather", "ag", 16 * 10**9, 16, 1)
    four = Collective("all-gather", "ag", 16 * 10**9, 4, 2)
    rate = 1e11  # of one side of a v5e's plane
    assert one.seconds("tpu:v5e:4x4") == pytest.approx(15e9 / (2 * rate))
    assert four.seconds("tpu:v5e:4x4") == pytest.approx(2 * 12e9 / rate)


SUMS = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter (q: f32[64]) -> f32[8] {
  %q = f32[64]{0:T(256)} parameter(0)
  %all-reduce.1 = f32[64]{0:T(256)} all-reduce(%q), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %start = s32[]{:T(128)} partition-id()
  ROOT %own = f32[8]{0:T(256)} dynamic-slice(%all-reduce.1, %start), dynamic_slice_sizes={8}
}

%update (q: f32[64]) -> f32[8] {
  %q = f32[64]{0:T(256)} parameter(0)
  %start = s32[]{:T(128)} partition-id()
  ROOT %own = f32[8]{0:T(256)} dynamic-slice(%q, %start), dynamic_slice_sizes={8}
}

ENTRY %main (a: f32[64]) -> (f32[8], f32[8], f32[8]) {
  %a = f32[64]{0:T(256)} parameter(0)
  %scattered = f32[8]{0:T(256)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  %whole = f32[64]{0:T(256)} all-reduce(%a), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
  %taken = f32[8]{0:T(256)} fusion(%whole), kind=kLoop, calls=%update
  %again = f32[64]{0:T(256)} all-reduce(%a), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
  %start = s32[]{:T(128)} partition-id()
  %own = f32[8]{0:T(256)} dynamic-slice(%again, %start), dynamic_slice_sizes={8}
  ROOT %r = (f32[8]{0:T(256)}, f32[8]{0:T(256)}, f32[8]{0:T(256)}) tuple(%scattered, %taken, %own)
}
"""


def test_on_a_tpu_a_sum_is_scattered_where_its_own_kernel_slices_it_alone():
    scattered, whole = 256 * 7 // 8, 2 * 256 * 7 // 8
    assert totals(collectives(SUMS)) == {"reduce-scatter": (1, scattered), "all-reduce": (2, 2 * whole)}


def test_on_a_cpu_whoever_slices_it():
    assert totals(collectives(SUMS.replace(":T(256)", "").replace(":T(128)", "").replace("{}", ""))).keys() == {
        "reduce-scatter"
    }
