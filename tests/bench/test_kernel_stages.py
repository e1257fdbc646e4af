"""Stages from kernels' names and order: on recorded lists and on random ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from million_cli.bench.kernel_stages import Kernel, kind_of, split_steps, staged, stages_of
from million_cli.bench.spans import STAGES
from million_cli.bench.stages import breakdown, shares

GEMV = "void gemvNSP_kernel<__half, __half, __half, float, 1, 32, 4, 1024>"
GEMM = "nvjet_hsh_64x8_64x16_4x1_v_bz_TNT"
SPLIT = "void cublasLt::splitKreduce_kernel<32, 16, int, float, __half>"
ELEMENT = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>"
NORM = "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1"
FLASH = "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4>>"
COMBINE = "void pytorch_flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4>>"
CUDNN = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0"
OURS = "void million::mma_decode_kernel<million::MmaDecode<128, 64, 64, 1, 16, 3>>(PagedDecodeParams)"
APPEND = "void million::append_kernel<million::AppendTraits<128>>(million::AppendParams)"
INDEX_COPY = "void at::native::index_copy_kernel_impl<at::native::OpaqueType<2>>"
ARGMAX = (
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::Half, at::native::ArgMaxOps<float>>>"
)
GATHER = "void at::native::(anonymous namespace)::vectorized_gather_kernel<16, long>"

PQ_LAYER = [
    (NORM, "norms"), (GEMV, "projections"), (SPLIT, "projections"), (GEMM, "projections"),
    (GEMM, "projections"), (ELEMENT, "rope"), (APPEND, "append"), (OURS, "attention"),
    (GEMM, "output projection"), (NORM, "norms"), (GEMM, "MLP"), (GEMM, "MLP"), (ELEMENT, "MLP"),
    (GEMM, "MLP"), (SPLIT, "MLP"),
]  # fmt: skip
DENSE_LAYER = [
    (NORM, "norms"), (GEMM, "projections"), (GEMM, "projections"), (GEMM, "projections"), (ELEMENT, "rope"),
    (INDEX_COPY, "append"), (INDEX_COPY, "append"), (FLASH, "attention"), (COMBINE, "merge"),
    (GEMM, "output projection"), (NORM, "norms"), (GEMM, "MLP"), (GEMM, "MLP"), (ELEMENT, "MLP"),
    (GEMM, "MLP"),
]  # fmt: skip
START = [(GATHER, "embedding")]
END = [(NORM, "norms"), (GEMM, "head"), (ARGMAX, "sampling"), (ELEMENT, "sampling")]


@pytest.mark.parametrize("layer", [PQ_LAYER, DENSE_LAYER], ids=["pq", "dense"])
@pytest.mark.parametrize("layers", [1, 2, 32])
def test_stages_of_recorded_steps(layer, layers):
    step = START + layer * layers + END
    assert stages_of([kind_of(name) for name, _ in step]) == [stage for _, stage in step]


def test_fused_projections_and_no_gate():
    """One product for q, k and v, two in the MLP, as in Phi-3."""
    layer = [
        (NORM, "norms"), (GEMM, "projections"), (ELEMENT, "rope"), (APPEND, "append"),
        (CUDNN, "attention"),
        (ELEMENT, "merge"), (GEMM, "output projection"), (ELEMENT, "norms"), (GEMM, "MLP"), (ELEMENT, "MLP"),
        (GEMM, "MLP"),
    ]  # fmt: skip
    step = START + layer * 3 + END
    assert stages_of([kind_of(name) for name, _ in step]) == [stage for _, stage in step]


FREQUENCIES = "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_tn_align1>(Params)"
JOINED_LAYER = [
    (GEMM, "projections"), (SPLIT, "projections"), (ELEMENT, "rope"), (APPEND, "append"),
    (OURS, "attention"), ("void million::merge_kernel<million::Merge<128, 1>>(P)", "merge"),
    (GEMM, "output projection"), (NORM, "norms"), (GEMM, "MLP"),
    ("triton_poi_fused__unsafe_view_mm_silu_slice_4", "MLP"), (GEMM, "MLP"), (SPLIT, "MLP"), (NORM, "norms"),
]  # fmt: skip


@pytest.mark.parametrize("layers", [2, 32])
def test_a_product_of_positions_and_frequencies(layers):
    """As torch.compile orders a Llama's step: one product ahead of the first layer's."""
    step = [
        ("triton_red_fused__to_copy_add_embedding_mean_mul_pow_rsqrt_0", "embedding"), (FREQUENCIES, "rope"),
        (ELEMENT, "rope"), *JOINED_LAYER * layers, (GEMM, "head"), (ARGMAX, "sampling"),
    ]  # fmt: skip
    assert stages_of([kind_of(name) for name, _ in step]) == [stage for _, stage in step]


def test_kinds():
    for name, kind in (
        (SPLIT, "skip"), (GEMV, "product"), (FLASH, "attention"), (CUDNN, "attention"), (COMBINE, "merge"),
        ("void million::encode_kernel<T>(million::EncodeParams)", "encode"), (INDEX_COPY, "append"),
        ("triton_red_fused__to_copy__unsafe_view_mm_silu_3", "product"), (NORM, "small"), (ELEMENT, "small"),
        ("triton_poi_fused_cat_cos_mul_neg_sin_2", "small"), ("Memset (Device)", "small"),
        (ARGMAX, "sampling"),
        ("triton_poi_fused_embedding_0", "embedding"),
        ("ampere_fp16_s16816gemm_fp16_64x64_ldg8_f2f_stages_64x5_tn", "product"),
    ):  # fmt: skip
        assert kind_of(name) == kind, name


kernels = st.lists(
    st.tuples(
        st.sampled_from([GEMM, ELEMENT, OURS, APPEND, ARGMAX, GATHER, SPLIT, COMBINE]),
        st.floats(0.1, 9.0),
        st.floats(-2.0, 3.0),
    ),
    min_size=1,
    max_size=30,
)


@given(step=kernels, count=st.integers(1, 4))
def test_stages_and_gaps_sum_to_the_step(step, count):
    """Also with overlaps: kernels may start up to 2 us before the previous one ends."""
    record, clock = [], 100.0
    for _ in range(count + 1):
        for name, duration, gap in step:
            start = max(clock + gap, record[-1].start_us if record else 0.0)
            record.append(Kernel(name, start, duration))
            clock = max(clock, start + duration)
        clock += 5.0
    steps = split_steps(record[::-1], count + 1)
    found = breakdown(shares(staged(steps)))
    assert tuple(found) == STAGES
    assert min(found.values()) >= 0
    assert sum(found.values()) == pytest.approx((steps[-1][0].start_us - steps[0][0].start_us) / count)


def test_time_is_given_to_the_kernel_that_runs():
    steps = [
        [Kernel(GEMM, 0, 10), Kernel(OURS, 8, 10), Kernel(GEMM, 20, 5), Kernel(GEMM, 25, 5)],
        [Kernel(GEMM, 32, 10)],
    ]
    rows = shares(staged(steps))
    assert rows[0] == ("projections", GEMM, 1, 10)
    found = {stage: us for stage, us in breakdown(rows).items() if us}
    assert found == {
        "projections": 10, "attention": 8, "output projection": 5, "head": 5, "host gap": 4,
    }  # fmt: skip


def test_lost_kernels_are_noticed():
    record = [Kernel(GEMM, 10.0 * i, 5) for i in range(7)]
    with pytest.raises(ValueError, match="7 kernels recorded over 2 steps"):
        split_steps(record, 2)
    record = [Kernel(GEMM, 0, 1), Kernel(OURS, 2, 1), Kernel(OURS, 4, 1), Kernel(GEMM, 6, 1)]
    with pytest.raises(ValueError, match="differ"):
        split_steps(record, 2)
