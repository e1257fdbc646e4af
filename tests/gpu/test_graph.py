"""A decode step in a CUDA graph: append and attention, lengths on the device, no allocation, no waiting."""

import pytest
import torch
from cases import DEVICE, Case, Shape
from test_lookup import contiguous_codes

from million_cli.ops import compiled, heuristics


class Step:
    """One layer's decode step over static buffers: lengths += 1, append, attend."""

    def __init__(self, shape: Shape) -> None:
        self.case = case = Case(shape)
        B, Hq, D = case.q.shape
        self.k, self.v = (
            torch.zeros(B, shape.kv_heads, D, dtype=shape.dtype, device=DEVICE) for _ in range(2)
        )
        self.tables = [compiled.code_major(c) for c in (case.key_centroids, case.value_centroids)]
        self.plan = compiled.DecodePlan.make(B, Hq, shape.kv_heads, D, DEVICE)
        self.out = torch.empty_like(case.q)

    def __call__(self) -> None:
        c, page = self.case, self.case.shape.window.page_size
        c.lengths += 1
        compiled.append(
            self.k, self.v, c.lengths, c.key_window, c.value_window, c.key_pool, c.value_pool, c.block_table,
            c.key_centroids, c.value_centroids, c.key_rotation, c.value_rotation, page_size=page,
        )  # fmt: skip
        compiled.paged_decode(
            c.q, c.key_pool, c.value_pool, c.block_table, c.lengths, None, *self.tables, c.key_rotation,
            c.value_rotation, c.key_window, c.value_window, self.plan, scale=c.scale, page_size=page,
            out=self.out,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("q_heads", "rotations", "M"), [(2, None, (64, 64)), (8, "head", (64, 64)), (16, None, (128, 16))]
)
def test_a_thousand_replayed_steps_equal_eager_ones(
    q_heads: int, rotations: str | None, M: tuple[int, int]
) -> None:
    shape = Shape([2000, 100, 40], q_heads, 2, 128, *M, rotations=rotations)
    eager, replayed = Step(shape), Step(shape)
    for step in (eager, replayed):  # the block tables have room for 2000 tokens
        step.case.lengths.fill_(300)
    assert torch.equal(eager.case.key_pool, replayed.case.key_pool)
    replayed()  # warm-up outside the graph, undone
    replayed.case.lengths.fill_(300)
    replayed.case.key_pool.copy_(eager.case.key_pool)
    replayed.case.value_pool.copy_(eager.case.value_pool)
    replayed.case.key_window.copy_(eager.case.key_window)
    replayed.case.value_window.copy_(eager.case.value_window)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed()
    assert int(replayed.case.lengths[0]) == 300  # capturing runs nothing
    for i in range(1000):
        for name in ("k", "v"):
            x = torch.randn_like(eager.k)
            getattr(eager, name).copy_(x)
            getattr(replayed, name).copy_(x)
        eager()
        graph.replay()
        if i % 50 == 0 or i > 990:
            assert torch.equal(eager.out, replayed.out), i
    assert torch.equal(eager.case.key_pool, replayed.case.key_pool)
    assert torch.equal(eager.case.value_pool, replayed.case.value_pool)
    assert int(replayed.case.lengths[0]) == 1300
    assert eager.out.isfinite().all()


def test_opcheck() -> None:
    step = Step(Shape([300, 128], 8, 2))
    step()
    c = step.case
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.million.paged_decode.default,
        (
            c.q, c.key_pool, c.value_pool, c.block_table, c.lengths, None, *step.tables, None, None,
            c.key_window,
            c.value_window, step.plan.workspace, step.out, c.scale, 64, step.plan.heads, step.plan.blocks,
        ),
        test_utils=checks,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.million.append.default,
        (
            step.k, step.v, c.lengths, c.key_window, c.value_window, c.key_pool, c.value_pool, c.block_table,
            c.key_centroids, c.value_centroids, None, None, 64, 2, 3,
        ),
        test_utils=checks,
    )  # fmt: skip
    plan = compiled.LookupPlan.make(*c.q.shape, DEVICE)
    for layout in (compiled.CodeLayout.ROW, compiled.CodeLayout.TRANSPOSED):
        torch.library.opcheck(
            torch.ops.million.contiguous_decode.default,
            (
                c.q, *contiguous_codes(c, layout), c.lengths, None, *step.tables, None, None, c.key_window,
                c.value_window, plan.workspace, step.out, c.scale, 64, int(layout), plan.splits,
            ),
            test_utils=checks,
        )  # fmt: skip
    x = torch.randn(2, 2, 64, 128, device=DEVICE).half()
    size = heuristics.encode_workspace_bytes(1 << 20, 2 * 64, 2)
    for workspace in (None, torch.zeros(size, dtype=torch.uint8, device=DEVICE)):
        torch.library.opcheck(
            torch.ops.million.pq_encode.default,
            (x, c.key_centroids, None, c.key_pool, c.block_table, workspace, 0, 64, 2),
            test_utils=checks,
        )
