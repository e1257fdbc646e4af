"""Rows of the kernel benchmark: what is derived from the times, without a GPU."""

import pytest

from million_cli.tasks import kernel_bench
from million_cli.tasks.kernel_bench import CASES, COLUMNS, LOOKUP_CASES, Case

CASE = Case(1, 32, 8, 4096, m_keys=64, m_values=32)


def row(layout: str, best: float | None, **measured: object) -> dict[str, object]:
    return kernel_bench._row("a GPU", CASE, layout, best, **measured)


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
    assert kernel_bench._buffers(nbytes) == buffers


def test_cases_are_distinct_shapes_of_whole_groups() -> None:
    assert len(set(CASES)) == len(CASES)
    assert set(LOOKUP_CASES) <= set(CASES)
    for case in CASES:
        assert case.q_heads % case.kv_heads == 0
        assert {case.m_keys, case.m_values} <= {case.head_dim // 2, case.head_dim // 4}
