"""Rows of the kernel benchmark: columns computed from times, without a GPU."""

import pytest

from million_cli.bench import kernels as kernel_bench
from million_cli.bench.kernel_cases import CASES, ENCODE_CASES, LOOKUP_CASES, Case, Config
from million_cli.bench.kernels import COLUMNS
from million_cli.errors import UserError
from million_cli.ops.fragment import DSUBS

CASE = Case(1, 32, 8, 4096, m_keys=64, m_values=32)


def row(layout: str, best: float | None, **measured: object) -> dict[str, object]:
    return kernel_bench.case_row("a GPU", CASE, layout, best, **measured)


def test_a_row_has_bandwidth_and_ratio() -> None:
    found = row("fragment", 30.0, impl="million paged", median_us=12.0, p90_us=12.5, bytes_read=24_000_000)
    assert tuple(found) == COLUMNS
    assert found["tb_per_s"] == 2.0
    assert found["ratio_to_best_dense"] == 2.5
    assert (found["m_keys"], found["m_values"], found["context"]) == (64, 32, 4096)


def test_dense_rows_have_no_codes() -> None:
    found = row("dense", 30.0, impl="sdpa flash", median_us=40.0, p90_us=41.0, bytes_read=80_000_000)
    assert found["m_keys"] is found["m_values"] is None
    assert found["ratio_to_best_dense"] == 0.75


def test_a_backend_that_cannot_serve_has_no_times() -> None:
    found = row("dense", None, impl="sdpa cudnn", median_us=None)
    assert found["median_us"] is found["tb_per_s"] is found["ratio_to_best_dense"] is None


@pytest.mark.parametrize(("nbytes", "buffers"), [(1 << 20, 16), (100 << 20, 3), (1 << 30, 2)])
def test_buffers_exceed_the_cache_within_bounds(nbytes: int, buffers: int) -> None:
    assert kernel_bench.number_of_buffers(nbytes) == buffers


def test_cases_are_distinct_shapes_of_whole_groups() -> None:
    assert len(set(CASES)) == len(CASES)
    assert set(LOOKUP_CASES) <= set(CASES)
    for case in CASES:
        assert case.q_heads % case.kv_heads == 0
        assert {case.m_keys, case.m_values} <= {case.head_dim // dsub for dsub in DSUBS}


def test_without_conditions_every_case_is_measured() -> None:
    assert Config().decode_cases() == CASES
    assert Config().encode_cases() == ENCODE_CASES


def test_conditions_hold_together() -> None:
    config = Config(dtype=["float16"], heads=["32/8"], batch=[1, 8], context=[32768], encode=False)
    assert config.encode_cases() == ()
    found = config.decode_cases()
    assert {(c.batch, c.m_keys, c.m_values) for c in found} == {
        (1, 64, 64), (8, 64, 64), (8, 64, 32), (8, 128, 64), (8, 32, 16),
    }  # fmt: skip
    assert all((c.q_heads, c.kv_heads, c.context, c.dtype) == (32, 8, 32768, "float16") for c in found)


def test_encoding_alone() -> None:
    config = Config(decode=False, dtype=["bfloat16"])
    assert config.decode_cases() == ()
    assert {(c.m, c.dtype) for c in config.encode_cases()} == {(64, "bfloat16"), (32, "bfloat16")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": [5]}, r"bench\.context=5: accepted are some of 4096, 32768, 131072"),
        ({"dtype": ["int8"]}, r"bench\.dtype=int8: accepted are some of float16, bfloat16"),
        ({"decode": False, "encode": False}, r"no case has all"),
    ],
)
def test_what_there_is_no_case_of_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**settings)


def test_counts_stay_integers_beside_empty_cells() -> None:
    bandwidth = {"gpu": "a GPU", "impl": "read bandwidth", "bytes_read": 1 << 31, "median_us": 500.0}
    ours = row("fragment", 30.0, impl="million paged", median_us=12.0, bytes_read=24_000_000, rotated=True)
    rows = [bandwidth, ours]
    frame = kernel_bench.as_frame(rows)
    lines = frame.to_csv(index=False).splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert lines[2].startswith(
        "a GPU,million paged,float16,1,32,8,128,4096,64,32,fragment,,12.0,,24000000,2.0,2.5"
    )
    assert "million paged" in kernel_bench.short_table(frame)
