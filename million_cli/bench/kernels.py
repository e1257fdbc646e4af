"""`million bench kernel`: decode attention over codes beside torch's dense attention, and encoding, as rows.

Each case is captured once in a CUDA graph that goes through several distinct buffers, more than the L2 holds,
so that every launch reads device memory.  A replay is timed with events; the figures are per launch.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from million_cli.bench.kernel_cases import LOOKUP_CASES, Case, Config, EncodeCase
from million_cli.ops import compiled
from million_cli.ops.fragment import FragmentLayout
from million_cli.spec import CodeSpec, WindowSpec
from million_cli.tables import write_table

COLUMNS = (
    "gpu", "impl", "dtype", "batch", "q_heads", "kv_heads", "head_dim", "context", "m_keys", "m_values",
    "layout", "page_size", "median_us", "p90_us", "bytes_read", "tb_per_s", "ratio_to_best_dense", "rel_err",
    "rotated",
)  # fmt: skip
_BUFFER_BYTES = 300 << 20  # distinct bytes a graph goes through, five times an H200's L2
_MAX_BUFFERS = 16
_ENCODE_REPLAYS = 5  # milliseconds each


WINDOW = WindowSpec(page_size=64, residual=128)


def bench(config: Config, done: Callable[[], Any] = lambda: None) -> Iterator[dict[str, Any]]:
    """Rows of COLUMNS: for each decode case torch's flash and cuDNN attention, then ours; then encoding.

    A backend that cannot serve a shape gives a row without times.  `done` is called after each case.
    """
    device, replays = torch.device("cuda"), config.replays
    gpu = torch.cuda.get_device_name(device)
    dense_cache: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    yield {"gpu": gpu, "impl": "read bandwidth", **_read_bandwidth(device, replays)}
    for case in config.decode_cases():
        key = (case.batch, case.q_heads, case.kv_heads, case.context, case.head_dim, case.dtype)
        if key not in dense_cache:
            dense_cache[key] = list(_dense_rows(case, device, replays))
        best = min((row["median_us"] for row in dense_cache[key] if row["median_us"]), default=None)
        for row in dense_cache[key]:
            yield case_row(gpu, case, "dense", best, **row)
        torch.cuda.empty_cache()
        for measured in _paged_rows(case, device, replays):
            yield case_row(gpu, case, "fragment", best, page_size=WINDOW.page_size, **measured)
        if case in LOOKUP_CASES:
            for layout in (compiled.CodeLayout.ROW, compiled.CodeLayout.TRANSPOSED):
                measured = _lookup_row(case, layout, device, replays)
                yield case_row(gpu, case, layout.name.lower(), best, page_size=WINDOW.page_size, **measured)
        torch.cuda.empty_cache()
        done()
    for prompt in config.encode_cases():
        for rotated in (False, True):
            yield {"gpu": gpu, **_encode_row(prompt, rotated, device, min(replays, _ENCODE_REPLAYS))}
        torch.cuda.empty_cache()
        done()


def case_row(gpu: str, case: Case, layout: str, best: float | None, **measured: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"gpu": gpu, "layout": layout, **asdict(case), **measured}
    if layout == "dense":
        row["m_keys"] = row["m_values"] = None
    if row.get("median_us"):
        row["tb_per_s"] = round(row["bytes_read"] / row["median_us"] / 1e6, 3)
        row["ratio_to_best_dense"] = round(best / row["median_us"], 3) if best else None
    return {column: row.get(column) for column in COLUMNS}


def time_graph(launches: Sequence[Callable[[], Any]], replays: int) -> dict[str, float]:
    """Median and 90th percentile, in microseconds per launch, of one graph that holds all `launches`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(3):
        graph.replay()
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)
    ]
    for begin, end in marks:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) * 1e3 / len(launches) for begin, end in marks)
    return {
        "median_us": round(statistics.median(times), 2),
        "p90_us": round(times[int(0.9 * (len(times) - 1))], 2),
    }


def number_of_buffers(bytes_each: int) -> int:
    return max(2, min(_MAX_BUFFERS, -(-_BUFFER_BYTES // bytes_each)))


def _read_bandwidth(device: torch.device, replays: int) -> dict[str, Any]:
    x = torch.zeros(1 << 29, dtype=torch.float32, device=device)
    out = torch.empty((), device=device)
    times = time_graph([lambda: torch.sum(x, dim=0, out=out)], replays)
    return {**times, "bytes_read": x.nbytes, "tb_per_s": round(x.nbytes / times["median_us"] / 1e6, 3)}


def _dense_rows(case: Case, device: torch.device, replays: int) -> Iterator[dict[str, Any]]:
    dtype = getattr(torch, case.dtype)
    kv = (case.batch, case.kv_heads, case.context, case.head_dim)
    nbytes = 2 * dtype.itemsize * case.batch * case.kv_heads * case.context * case.head_dim
    buffers = [
        tuple(torch.randn(kv, dtype=dtype, device=device) for _ in range(2))
        for _ in range(number_of_buffers(nbytes))
    ]
    q = torch.randn(case.batch, case.q_heads, 1, case.head_dim, dtype=dtype, device=device)
    gqa = case.q_heads != case.kv_heads
    sample = slice(0, 1)
    for name, backend in (
        ("sdpa flash", SDPBackend.FLASH_ATTENTION),
        ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        try:
            with sdpa_kernel(backend):
                launches = [
                    partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=gqa) for k, v in buffers
                ]
                times = time_graph(launches, replays)
                out = launches[0]()
        except RuntimeError:
            yield {"impl": name, "median_us": None}
            continue
        k, v = (x[sample, :1].double() for x in buffers[0])
        exact = F.scaled_dot_product_attention(
            q[sample, : case.q_heads // case.kv_heads].double().transpose(1, 2), k, v
        )
        error = _relative_error(out[sample, : case.q_heads // case.kv_heads].transpose(1, 2), exact)
        yield {"impl": name, "bytes_read": nbytes, "rel_err": error, **times}


def _relative_error(got: Tensor, exact: Tensor) -> float:
    return float(f"{(got.double() - exact).norm() / exact.norm():.2e}")


def _paged_rows(case: Case, device: torch.device, replays: int) -> Iterator[dict[str, Any]]:
    """Decode attention without and with the maps of trained codebooks, over the same buffers.

    The maps are a rotation of keys and of values for each head, and keys relative to the origin of their
    block.
    """
    dtype = getattr(torch, case.dtype)
    B, Hkv, D, P, R = case.batch, case.kv_heads, case.head_dim, WINDOW.page_size, WINDOW.residual
    keys = FragmentLayout(CodeSpec(D, case.m_keys, 8), P, "keys")
    values = FragmentLayout(CodeSpec(D, case.m_values, 8), P, "values")
    coded = WINDOW.coded_length(case.context)
    pages = B * (coded // P)
    nbytes = pages * Hkv * (keys.page_bytes + values.page_bytes)
    nbytes += 2 * B * Hkv * (case.context - coded) * D * dtype.itemsize
    tables = [torch.randn(Hkv, 256, D, device=device).half() for _ in range(2)]
    lengths = torch.full((B,), case.context, dtype=torch.int32, device=device)
    q = torch.randn(B, case.q_heads, D, dtype=dtype, device=device)
    plan = compiled.DecodePlan.make(B, case.q_heads, Hkv, D, device)
    rotations = [_rotations(Hkv, D, device) for _ in range(2)]
    buffers = []
    for _ in range(number_of_buffers(nbytes)):
        pools = [
            torch.randint(0, 256, (pages, Hkv, *layout.page_shape), dtype=torch.uint8, device=device)
            for layout in (keys, values)
        ]
        windows = [torch.randn(B, Hkv, R, D, dtype=dtype, device=device) for _ in range(2)]
        buffers.append((pools, windows, torch.randperm(pages, device=device).int().view(B, -1)))
    # The error of the first KV head of the first sequence, against float64 over the decoded vectors.
    group, (pools, windows, block_table) = case.q_heads // Hkv, buffers[0]
    positions = torch.arange(coded, case.context, device=device) % R
    for rotated in (False, True):
        key_rotation, value_rotation = rotations if rotated else (None, None)
        launches: list[Callable[[], Tensor]] = [
            partial(
                compiled.paged_decode,
                q, pool[0], pool[1], ids, lengths, None, tables[0], tables[1], key_rotation, value_rotation,
                window[0], window[1], plan, scale=D**-0.5, page_size=P,
            )
            for pool, window, ids in buffers
        ]  # fmt: skip
        times = time_graph(launches, replays)
        dense: list[Tensor] = []
        for layout, codes_of, table, rotation, newest in zip(
            (keys, values), pools, tables, rotations, windows, strict=True
        ):
            codes = layout.unpack(codes_of[block_table[0].long(), 0]).flatten(0, 1)  # [coded, M]
            centroids = table[0].double().view(256, layout.spec.M, layout.spec.dsub)
            decoded = centroids[codes.long(), torch.arange(layout.spec.M, device=device)].flatten(1)
            if rotated:
                decoded = decoded @ rotation[0].double().T
            dense.append(torch.cat([decoded, newest[0, 0, positions].double()]))
        exact = F.scaled_dot_product_attention(q[0, :group].double(), dense[0], dense[1])
        yield {
            "impl": "million paged",
            "rotated": rotated,
            "bytes_read": nbytes,
            "rel_err": _relative_error(launches[0]()[0, :group], exact),
            **times,
        }


def _rotations(heads: int, D: int, device: torch.device) -> Tensor:
    """Random orthogonal matrices [heads, D, D]."""
    return torch.linalg.qr(torch.randn(heads, D, D, device=device))[0].contiguous()


def _lookup_row(
    case: Case, layout: compiled.CodeLayout, device: torch.device, replays: int
) -> dict[str, Any]:
    dtype = getattr(torch, case.dtype)
    B, Hkv, D, P, R = case.batch, case.kv_heads, case.head_dim, WINDOW.page_size, WINDOW.residual
    coded = WINDOW.coded_length(case.context)
    nbytes = B * Hkv * coded * (case.m_keys + case.m_values)
    nbytes += 2 * B * Hkv * (case.context - coded) * D * dtype.itemsize
    tables = [torch.randn(Hkv, 256, D, device=device).half() for _ in range(2)]
    lengths = torch.full((B,), case.context, dtype=torch.int32, device=device)
    q = torch.randn(B, case.q_heads, D, dtype=dtype, device=device)
    plan = compiled.LookupPlan.make(B, case.q_heads, D, device)
    transposed = layout is compiled.CodeLayout.TRANSPOSED
    shape = (coded // P, case.m_values, P) if transposed else (coded, case.m_values)
    launches: list[Callable[[], Tensor]] = []
    for _ in range(number_of_buffers(nbytes)):
        keys = torch.randint(0, 256, (B, Hkv, coded, case.m_keys), dtype=torch.uint8, device=device)
        values = torch.randint(0, 256, (B, Hkv, *shape), dtype=torch.uint8, device=device)
        windows = [torch.randn(B, Hkv, R, D, dtype=dtype, device=device) for _ in range(2)]
        launches.append(
            partial(
                compiled.contiguous_decode,
                q, keys, values, lengths, None, tables[0], tables[1], None, None, windows[0], windows[1],
                plan, scale=D**-0.5, page_size=P, value_layout=layout,
            )
        )  # fmt: skip
    return {
        "impl": "million lookup",
        "rotated": False,
        "bytes_read": nbytes,
        **time_graph(launches, replays),
    }


def _encode_row(case: EncodeCase, rotated: bool, device: torch.device, replays: int) -> dict[str, Any]:
    """Encoding keys and values of a prompt of one layer into pages."""
    T, H, D, M, P = case.context, case.kv_heads, case.head_dim, case.m, WINDOW.page_size
    pages = T // P
    table = torch.randperm(pages, device=device).int().view(1, pages)
    rotation = _rotations(H, D, device) if rotated else None
    centroids = torch.randn(H, M, 256, D // M, device=device)
    sides = []
    for layout in (compiled.CodeLayout.FRAGMENT_KEYS, compiled.CodeLayout.FRAGMENT_VALUES):
        x = torch.randn(1, T, H, D, device=device).to(getattr(torch, case.dtype)).transpose(1, 2)
        sides.append((x, torch.zeros(pages, H, P * M, dtype=torch.uint8, device=device), layout))

    def launch() -> None:
        for x, pool, layout in sides:
            compiled.pq_encode(x, centroids, rotation, pool, table, start=0, page_size=P, layout=layout)

    return {
        "impl": "million encode", "dtype": case.dtype, "batch": 1, "kv_heads": H, "head_dim": D, "context": T,
        "m_keys": M, "m_values": M, "layout": "fragment", "page_size": P, "rotated": rotated,
        "bytes_read": sum(x.nbytes for x, _, _ in sides), **time_graph([launch], replays),
    }  # fmt: skip


def as_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table of COLUMNS, counts as integers although some cells are empty."""
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in ("batch", "q_heads", "kv_heads", "head_dim", "context", "m_keys", "m_values", "page_size",
                   "bytes_read"):  # fmt: skip
        frame[column] = frame[column].astype("Int64")
    return frame


def short_table(frame: pd.DataFrame) -> str:
    """The columns that matter, for a terminal."""
    shown = ["impl", "dtype", "batch", "q_heads", "kv_heads", "context", "m_keys", "m_values", "layout",
             "rotated", "median_us", "tb_per_s", "ratio_to_best_dense", "rel_err"]  # fmt: skip
    return frame[shown].to_string(index=False, na_rep="")


if __name__ == "__main__":
    table = as_frame(list(bench(Config())))
    write_table(Path(sys.argv[1]), table, "kernel")
    print(short_table(table))
