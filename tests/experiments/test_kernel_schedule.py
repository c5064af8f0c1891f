"""The static count of a kernel equals a count by hand, knows what it cannot know, and rows are judged rightly."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import _schedule
import _schedule_programs as programs
import kernel_schedule
import numpy as np
import pytest

# A loop of three trips. Its first trip alone runs region 5 (bundles 7 to 10); a trip whose entry in the table is 1
# skips region 8 (bundles 16 to 18). After a branch four more bundles run in any case.
KERNEL = textwrap.dedent("""\
    = control target key start
    LB: loop body
    = control target key end
         0   :  { %s10_s0 = smov [#allocation2] ;;  %s11_s1 = inlined_call_operand.vmem [shape: s32[3], index: 0] }
       0x1   :  { %12 = dma.vmem_to_smem /*vmem=*/%s11_s1, /*size_in_granules=*/16, /*smem=*/%s10_s0, [#allocation1] }
       0x2   :  { %s20_s2 = smov 0 /* copy for cssa */ }
       0x3 LB: > { %s22_s4 = sadd.s32 1, %s21_s3  ;;  %s21_s3 = sphi %s20_s2, %s22_s4 } /* Start region 1 */
       0x4   : > { %30 = sst [smem:[#allocation9_spill]] %s21_s3  ;;  %p31_p0 = scmp.ne.s32.totalorder %s21_s3, 0 }
       0x5   : > { %32 = sbr.rel (%p31_p0) target = $region7 }
       0x6   : > { %33 = vadd.f32 %v1_v1, %v2_v2  ;;  %s34_s5 = sld [smem:[#allocation2 + %s21_s3]] }
       0x7   : > { %p35_p1 = scmp.eq.s32.totalorder %s34_s5, 1 } /* Start region 5 */
       0x8   : > { %36 = vadd.f32 %v1_v1, %v2_v2 }
       0x9   : > { %37 = vadd.f32 %v1_v1, %v2_v2 }
       0xa   : > { %38 = vadd.f32 %v1_v1, %v2_v2 }
       0xb PF: > { %39 = vmatmul.mxu0 %v1_v1 } /* Start/End empty region 7 :: Start region 8 */
       0xc   : > { %40 = sbr.rel (%p35_p1) target = $region9 }
       0xd   : > { %41 = vmatmul.mxu0 %v1_v1 }
       0xe   : > { %s42_s6 = sld [smem:[#allocation9_spill]] }
       0xf   : > { %p43_p2 = scmp.ge.s32.totalorder %s42_s6, 2 }
      0x10   : > { %44 = vmatmul.mxu0 %v1_v1 }
      0x11   : > { %45 = vmatmul.mxu0 %v1_v1 }
      0x12   : > { %46 = vmatmul.mxu0 %v1_v1 }
      0x13 PF: > { %47 = sbr.rel (!%p43_p2) target = $region1 } /* Start/End empty region 9 */
      0x14   : > { %s48_s7 = smov (%p43_p2, %s42_s6), 7 }
      0x15   : > {}
      0x16   : > {}
      0x17   : > {}
      0x18   :  { %50 = vadd.f32 %v1_v1, %v2_v2 }
    """)
MATMULS = {11: 1, 13: 2, 16: 1, 17: 1, 18: 1}


def _utilization(matmuls: dict[int, int], count: int = 25) -> str:
    rows = "\n".join(f"{matmuls.get(i, 0)} 0 1" for i in range(count))
    return f"== CAPACTIY:\nMXU, XLU, SALU\n    2     3     2\n== UTILIZATION:\n{rows}\n"


def test_the_count_is_that_of_a_count_by_hand():
    found = _schedule.count(KERNEL, _utilization(MATMULS), {0: np.array([0, 1, 0])})
    # 3 before the loop and 1 after it. Bundles 3 to 9 run in every trip (6 to 9 stand in the branch's delay), bundle
    # 10 in the first alone; 11 to 16 in every trip, 17 and 18 in those whose entry is 0; 19 to 23 in every trip.
    assert found.cycles == 4 + 3 * (7 + 6 + 5) + 1 + 2 * 2
    assert found.matmul_slots == 3 * (1 + 2 + 1) + 2 * (1 + 1)
    assert (found.steps, found.matmul_units) == (3, 2)
    assert found.matmul_use == pytest.approx(16 / (2 * 63))
    none = _schedule.count(KERNEL, _utilization(MATMULS), {0: np.array([0, 0, 0])})
    assert none.cycles == found.cycles + 2


def test_what_the_count_cannot_know_is_an_error():
    with pytest.raises(_schedule.Unknown, match="%p35_p1, which was not evaluated"):
        _schedule.count(KERNEL, _utilization(MATMULS), {})
    with pytest.raises(ValueError, match="25 bundles, and figures for 24"):
        _schedule.count(KERNEL, _utilization(MATMULS, 24), {})
    with pytest.raises(_schedule.Unknown, match="more than 10 bundles"):
        _schedule.count(KERNEL, _utilization(MATMULS), {0: np.array([0, 1, 0])}, limit=10)


def test_scalar_memory_packs_bytes_four_rows_to_a_word():
    assert _schedule.words(np.array([3, -1], np.int32)).tolist() == [3, -1]
    found = _schedule.words(np.arange(12, dtype=np.int8).reshape(1, 4, 3))
    assert found.size == 128
    assert [hex(word) for word in found[:3]] == ["0x9060300", "0xa070401", "0xb080502"]


CASE = {"target": "v5e", "pass": "forward", "length": 2048, "head_dim": 128, "causal": True, "heads": 2}


def _rows(ours, theirs, **more):
    made = [("memopt", [256, 512], ours + 1), ("memopt", [512, 512], ours), ("flash", [512, 512], theirs)]
    return [CASE | {"system": s, "blocks": b, "cycles": n, "use": 0.5} | more for s, b, n in made]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (_rows(80, 100), []),
        (_rows(95, 100), ["the median is 0.950"]),
        (_rows(110, 100), ["110 cycles, flash 100 (1.100)", "the median"]),
        (_rows(80, 100)[:2], ["memopt or all others could not be counted"]),
        (
            [{k: v for k, v in row.items() if k != "cycles"} for row in _rows(1, 1)],
            ["memopt or all others could not be counted"],
        ),
    ],
)
def test_rows_are_judged_at_their_best_blocks(rows, words):
    chosen = kernel_schedule.best(rows)
    assert len(chosen) == len({row["system"] for row in rows})
    found = kernel_schedule.misses(chosen)
    assert len(found) == len(words) and all(word in one for word, one in zip(words, found, strict=True))


def test_lengths_are_counted_outward_from_one_and_sizes_near_the_best_go_on():
    assert kernel_schedule.chain([8192, 2048, 4096, 16384], 4096) == [
        (4096, None),
        (2048, 4096),
        (8192, 4096),
        (16384, 8192),
    ]
    assert kernel_schedule.chain([1024], 4096) == [(1024, None)]
    rows = [
        {"system": system, "blocks": [size, size], "pass": name, **({"cycles": cycles} if cycles else {"note": "no"})}
        for system, size, name, cycles in [
            ("memopt", 1, "forward", 10),  # does not count
            ("flash", 1, "forward", 100),
            ("flash", 2, "forward", 109),
            ("flash", 3, "forward", 111),
            ("splash", 3, "forward", None),
            ("splash", 3, "backward", 50),
        ]
    ]
    assert kernel_schedule.near(rows, 1.1) == [("flash", [1, 1]), ("flash", [2, 2]), ("splash", [3, 3])]


# A kernel that multiplies in every second step, as a table says, for three lengths of its grid.
COMPILED = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import _schedule_programs

def kernel(table_ref, x_ref, out_ref):
    @pl.when(table_ref[pl.program_id(0)] == 1)
    def _():
        out_ref[...] = jnp.dot(x_ref[...], x_ref[...], preferred_element_type=jnp.float32)

def counted(steps):
    spec = pl.BlockSpec((128, 128), lambda i, table: (i, 0))
    grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(steps,), in_specs=[spec], out_specs=spec)
    x = jax.ShapeDtypeStruct((128 * steps, 128), jnp.float32)
    call = pl.pallas_call(kernel, grid_spec=grid, out_shape=x, name="every_second")
    run = lambda x: call(jnp.asarray(np.arange(steps) % 2, jnp.int32), x)
    (count,) = _schedule_programs.compiled_counts(run, [x], "v5e", sys.argv[1]).values()
    return count.cycles, count.steps, count.matmul_slots

print(json.dumps([counted(n) for n in (8, 12, 16)]))
"""


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_a_compiled_kernel_costs_the_same_for_each_four_steps_more(tmp_path):
    flags = f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true"
    folder = pathlib.Path(programs.__file__).parent
    environment = {**os.environ, "LIBTPU_INIT_ARGS": flags, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", COMPILED, str(tmp_path)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    small, middle, large = json.loads(made.stdout.splitlines()[-1])
    assert large[0] - middle[0] == middle[0] - small[0] > 0
    assert large[1] - middle[1] == 4
    assert small[2] > 0 and large[2] == 2 * small[2] and middle[2] == 1.5 * small[2]  # half of the steps multiply
