"""Each kernel once on small cases, for compute-sanitizer (scripts/gpu_suite.sh)."""

import torch
from cases import DEVICE, Case, Shape
from test_lookup import decode

from million_cli.ops import compiled, heuristics
from million_cli.ops.compiled import CodeLayout
from million_cli.spec import WindowSpec

SHAPES = [
    Shape([700, 129], 2, 2, 128, 64, 64, rotations="head", first_valid=[3, 0]),
    Shape([700, 129], 8, 2, 128, 64, 32, rotations="head", first_valid=[3, 0]),
    Shape([700, 129], 16, 2, 128, 32, 64, rotations="head"),
    Shape([700, 129], 8, 2, 64, 32, 16, rotations="head", first_valid=[3, 0]),
    Shape([300, 47], 8, 2, 64, 32, 32, WindowSpec(16, 48), torch.bfloat16),
    Shape([1000, 512], 4, 2, 128, 64, 64, WindowSpec(256, 512), torch.bfloat16, rotations="layer"),
    Shape([90, 1], 8, 2, tables="layer"),  # nothing is coded
    Shape([700, 129], 8, 2, 128, 128, 16, rotations="head", first_valid=[3, 0]),
    Shape([300, 47], 16, 2, 64, 8, 64, WindowSpec(16, 48), torch.bfloat16),
]


def encode(case: Case, tables: bool) -> None:
    """A page and a half of keys, without or with a workspace for grids or sorted centroids."""
    shape, P = case.shape, case.shape.window.page_size
    Hc, M, _, dsub = case.key_centroids.shape
    workspace = None
    if tables:
        size = heuristics.encode_workspace_bytes(1 << 20, Hc * M, dsub)
        workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    B, T = len(shape.lengths), P * case.block_table.shape[1] // 32 * 16
    x = torch.randn(B, shape.kv_heads, T, shape.head_dim, device=DEVICE).to(shape.dtype)
    torch.ops.million.pq_encode(
        x, case.key_centroids, case.key_rotation, case.key_pool, case.block_table, workspace,
        0, P, int(CodeLayout.FRAGMENT_KEYS),
    )  # fmt: skip


def flush(case: Case) -> None:
    """A step in which every sequence is due for a page."""
    shape, P, R = case.shape, case.shape.window.page_size, case.shape.window.residual
    case.lengths.copy_(torch.tensor([max(coded, P) + R - P for coded in case.coded]))
    k, v = (
        torch.randn(len(shape.lengths), shape.kv_heads, shape.head_dim, device=DEVICE).to(shape.dtype)
        for _ in range(2)
    )
    compiled.append(
        k, v, case.lengths, case.key_window, case.value_window, case.key_pool, case.value_pool,
        case.block_table, case.key_centroids, case.value_centroids, case.key_rotation, case.value_rotation,
        page_size=P,
    )  # fmt: skip


for i, shape in enumerate(SHAPES):
    case = Case(shape)
    case.decode()
    decode(case, CodeLayout.ROW)
    decode(case, CodeLayout.TRANSPOSED)
    encode(case, tables=False)
    if i in (0, 3, 4, 7):  # with and without a rotation, both dtypes, two dims and one
        encode(case, tables=True)
    flush(case)
torch.cuda.synchronize()
print("done")
