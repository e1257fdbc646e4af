"""Each kernel once on a small case, for compute-sanitizer (scripts/gpu_suite.sh)."""

import torch
from cases import DEVICE, Case, Shape
from test_lookup import decode

from million_cli.ops import compiled

for q_heads, m_values, head_dim in ((2, 64, 128), (8, 32, 128), (8, 16, 64)):
    case = Case(
        Shape([700, 129], q_heads, 2, head_dim, head_dim // 2, m_values, rotations="head", first_valid=[3, 0])
    )
    case.decode()
    decode(case, compiled.CodeLayout.ROW)
    decode(case, compiled.CodeLayout.TRANSPOSED)
    D = head_dim
    x = torch.randn(2, 2, 128, D, device=DEVICE).half()
    compiled.pq_encode(
        x, case.key_centroids, case.key_rotation, case.key_pool, case.block_table,
        start=0, page_size=64, layout=compiled.CodeLayout.FRAGMENT_KEYS,
    )  # fmt: skip
    case.lengths.copy_(torch.tensor([704, 128]))  # both sequences are due for a page
    compiled.append(
        x[:, :, 0], x[:, :, 1], case.lengths, case.key_window, case.value_window, case.key_pool,
        case.value_pool,
        case.block_table, case.key_centroids, case.value_centroids, case.key_rotation, case.value_rotation,
        page_size=64,
    )  # fmt: skip
torch.cuda.synchronize()
print("done")
