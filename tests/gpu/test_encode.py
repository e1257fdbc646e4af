"""Encoding on the GPU: nearest centroids up to ties in float32; tables give the codes of the scan."""

import pytest
import torch
from cases import DEVICE
from torch import Tensor

from million_cli.ops import compiled, heuristics
from million_cli.ops.compiled import CodeLayout
from million_cli.ops.fragment import DSUBS, FragmentLayout
from million_cli.ops.layouts import Layout, RowLayout, TransposedLayout
from million_cli.spec import CodeSpec

SHAPES = [(D, D // dsub) for D in (128, 64) for dsub in DSUBS]
# `tables`: with a workspace, for grids (two dims a subspace) or sorted centroids (one).
WAYS = [(D, M, tables) for D, M in SHAPES for tables in (False, True) if not tables or 2 * M >= D]


def layout_of(kind: CodeLayout, spec: CodeSpec, page: int) -> Layout:
    if kind is CodeLayout.ROW:
        return RowLayout(spec, page)
    if kind is CodeLayout.TRANSPOSED:
        return TransposedLayout(spec, page)
    return FragmentLayout(spec, page, "keys" if kind is CodeLayout.FRAGMENT_KEYS else "values")


def quantizer(D: int, M: int, heads: int, rotated: bool) -> tuple[Tensor, Tensor | None]:
    centroids = torch.randn(heads, M, 256, D // M, device=DEVICE)
    rotation = torch.linalg.qr(torch.randn(heads, D, D, device=DEVICE))[0].contiguous() if rotated else None
    return centroids, rotation


def check_codes(codes: Tensor, x: Tensor, centroids: Tensor, rotation: Tensor | None) -> None:
    """codes [B, H, T, M] are nearest centroids; the distance may exceed the least by float32 rounding."""
    _, H, T, M = codes.shape
    table = centroids.double().expand(H, -1, -1, -1)
    mismatched = 0
    for h in range(H):
        for first in range(0, T, 4096):
            part = x[:, h, first : first + 4096].double()
            if rotation is not None:
                part = part @ rotation.double()[h if rotation.shape[0] > 1 else 0]
            points = part.unflatten(-1, (M, -1))
            chosen = codes[:, h, first : first + 4096].long()
            distance = (points[..., None, :] - table[h]).square().sum(-1)  # [B, t, M, 256]
            least, best = distance.min(-1)
            excess = distance.gather(-1, chosen[..., None])[..., 0] - least
            assert (excess <= 2e-6 * (points.square().sum(-1) + 1)).all()
            mismatched += int((best != chosen).sum())
    assert mismatched <= 1e-4 * codes.numel() + 2


def encode_by(
    tables: bool,
    x: Tensor,
    centroids: Tensor,
    rotation: Tensor | None,
    codes: Tensor,
    table: Tensor | None,
    start: int,
    page: int,
    kind: CodeLayout,
) -> None:
    """`pq_encode` with a workspace for tables or without one, whatever the length."""
    Hc, M, _, dsub = centroids.shape
    size = heuristics.encode_workspace_bytes(heuristics.MIN_GRID_POINTS, Hc * M, dsub)
    # What lies in the workspace before does not matter.
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE) if tables else None
    torch.ops.million.pq_encode(x, centroids, rotation, codes, table, workspace, start, page, int(kind))


@pytest.mark.parametrize("kind", list(CodeLayout))
@pytest.mark.parametrize(("D", "M", "tables"), WAYS)
@pytest.mark.parametrize(("rotated", "dtype"), [(0, "bfloat16"), (1, "float16"), (1, "bfloat16")])
def test_pages(kind: CodeLayout, D: int, M: int, tables: bool, rotated: int, dtype: str) -> None:
    B, H, P, T, start = 2, 3, 48, 480, 96
    centroids, rotation = quantizer(D, M, H, bool(rotated))
    layout = layout_of(kind, CodeSpec(D, M, 8), P)
    x = torch.randn(B, T, H, D, device=DEVICE).to(getattr(torch, dtype)).transpose(1, 2)  # as models give it
    width = (start + T) // P
    table = torch.randperm(B * width + 1, device=DEVICE)[: B * width].int().view(B, width)
    pool = torch.full((B * width + 1, H, *layout.page_shape), 255, dtype=torch.uint8, device=DEVICE)
    encode_by(tables, x, centroids, rotation, pool, table, start, P, kind)
    codes = layout.unpack(pool[table.long()].transpose(1, 2)).flatten(2, 3)  # [B, H, width * P, M]
    assert (codes[:, :, :start] == 255).all()
    check_codes(codes[:, :, start:], x, centroids, rotation)


def rows(x: Tensor, centroids: Tensor, rotation: Tensor | None, tables: bool | None = None) -> Tensor:
    """Codes [B, H, T, M] of x; `tables` None leaves the choice to the op's caller."""
    B, H, T, _ = x.shape
    codes = torch.full((B, H, T, centroids.shape[1]), 7, dtype=torch.uint8, device=DEVICE)
    if tables is None:
        compiled.pq_encode(x, centroids, rotation, codes, None, start=0, page_size=16, layout=CodeLayout.ROW)
    else:
        encode_by(tables, x, centroids, rotation, codes, None, 0, 16, CodeLayout.ROW)
    return codes


@pytest.mark.parametrize(("D", "M"), SHAPES)
def test_contiguous(D: int, M: int) -> None:
    B, H, T = 1, 2, 1008
    centroids, _ = quantizer(D, M, 1, False)
    x = torch.randn(B, H, T, D, device=DEVICE).half()
    codes = torch.zeros(B, H, 1024, M, dtype=torch.uint8, device=DEVICE)
    compiled.pq_encode(x, centroids, None, codes, None, start=0, page_size=16, layout=CodeLayout.ROW)
    check_codes(codes[:, :, :T], x, centroids, None)
    assert not codes[:, :, T:].any()


@pytest.mark.parametrize(
    ("M", "T"),
    [(64, 16), (64, 2032), (64, 2048), (64, 2080), (64, 33008), (128, 496), (128, 528), (128, 20496)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lengths(M: int, T: int, dtype: torch.dtype) -> None:
    """Either side of where grids and sorted centroids begin, whole and broken chunks of tokens."""
    centroids, rotation = quantizer(128, M, 2, True)
    x = torch.randn(1, T, 2, 128, device=DEVICE).to(dtype).transpose(1, 2)
    codes = rows(x, centroids, rotation)
    check_codes(codes, x, centroids, rotation)
    assert torch.equal(codes, rows(x, centroids, rotation, tables=False))


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("M", "offset", "padding"), [(64, 2, 2), (64, 2, 6), (64, 8, 8), (64, 0, 2), (128, 2, 2), (128, 8, 8)]
)
def test_rows_that_are_not_aligned(M: int, tables: bool, rotated: bool, offset: int, padding: int) -> None:
    centroids, rotation = quantizer(128, M, 2, rotated)
    x = (
        torch.randn(2, 256, 2, 128 + padding, device=DEVICE)
        .half()[..., offset : offset + 128]
        .transpose(1, 2)
    )
    assert torch.equal(
        rows(x, centroids, rotation, tables), rows(x.contiguous(), centroids, rotation, tables=False)
    )


@pytest.mark.parametrize(("M", "tables"), [(128, False), (128, True), (64, False), (64, True), (16, False)])
def test_lowest_index_wins_a_tie(M: int, tables: bool) -> None:
    centroids = torch.zeros(1, M, 256, 128 // M, device=DEVICE)
    x = torch.randn(1, 1, 16, 128, device=DEVICE).half()
    assert not rows(x, centroids, None, tables).any()
    centroids[:, :, 100:] = 1.0  # two distinct centroids, in 100 and 156 copies
    codes = rows(torch.where(x > 0.5, 1.0, 0.0).half(), centroids, None, tables)
    assert set(codes.unique().tolist()) <= {0, 100}


def codebooks(dsub: int) -> Tensor:
    """[64 / dsub, 256, dsub]: centroids that are hard to search, then random ones of all sizes and places."""
    side = round(256 ** (1 / dsub))
    lattice = torch.cartesian_prod(*[torch.arange(float(side))] * dsub).view(256, dsub)
    line, turn = torch.randn(256, 1), torch.linspace(0, 6.28, 256)[:, None]
    axis = torch.eye(dsub)
    uneven = torch.tensor([1.0, 1e-3, 10.0, 1.0] * 2)[:dsub]
    hard = [
        torch.full((256, dsub), 0.375),
        line * axis[0],
        line * axis[-1],
        line.expand(-1, dsub),
        turn.cos() * axis[0] + turn.sin() * axis[-1],
        lattice,
        lattice / 3,
        torch.randn(7, dsub)[torch.randint(0, 7, (256,))],
        torch.cat([torch.ones(240, dsub), torch.randn(16, dsub)]),
        torch.cat([torch.randn(128, dsub) * 1e-3, torch.randn(128, dsub) * 1e-3 + 5]),
        (torch.randn(64, 1, dsub) + torch.randn(64, 4, dsub) * 1e-7).reshape(256, dsub),
        torch.distributions.Cauchy(0.0, 1.0).sample((256, dsub)),
        torch.randn(256, dsub) * uneven,
        torch.randn(256, dsub) * 0.01 + 100,
        *(torch.randn(256, dsub) * 10.0**power for power in (3, -4, -19, -22, -39, 18)),
    ]
    order = torch.randperm(len(hard))[: 64 // dsub]  # of four or eight dims there is room for some
    scales = 10.0 ** torch.randn(64 // dsub - len(order), 1, 1)
    rest = (torch.randn(len(scales), 256, dsub) + torch.randn(1, dsub)) * scales
    return torch.cat([torch.stack([hard[i] for i in order]), rest])


def scanned(x: Tensor, books: Tensor) -> Tensor:
    """Codes [T, M] of the scan: fused multiply-adds in float32, the lowest index at the least distance."""
    codes = []
    for m, book in enumerate(books):
        distance = torch.zeros(len(x), 256, device=x.device)
        for j in range(book.shape[1]):
            difference = (x[:, m, j, None] - book[:, j]).double()
            distance = (difference.square() + distance.double()).float()
        codes.append(distance.argmin(1))
    return torch.stack(codes, 1).byte()


@pytest.mark.parametrize(
    ("M", "tables"), [(64, True), (64, False), (32, True), (32, False), (16, False), (8, False)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_codes_are_those_of_the_scan(M: int, tables: bool, dtype: torch.dtype, seed: int) -> None:
    """Points on and near centroids, between two of them, spread like them, and far outside."""
    torch.manual_seed(seed)
    books = codebooks(64 // M)
    size = books.std(1, keepdim=True)
    one, two = (torch.take_along_dim(books, torch.randint(0, 256, (M, 1024, 1)), 1) for _ in range(2))
    near = one + torch.randn_like(one) * size * 10.0 ** -(4 * torch.rand(M, 1024, 1))
    spread = books.mean(1, keepdim=True) + torch.randn_like(one) * size
    far = books.mean(1, keepdim=True) + torch.randn_like(one) * size * 50
    points = torch.cat([one, near, (one + two) / 2, spread, far], 1)  # [M, 5120, dsub]
    x = points.clamp(-6e4, 6e4).transpose(0, 1).reshape(1, 1, -1, 64).to(DEVICE, dtype).contiguous()
    books = books.to(DEVICE)
    expected = scanned(x[0, 0].float().unflatten(-1, (M, -1)), books)
    assert torch.equal(rows(x, books[None], None, tables)[0, 0], expected)


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [64, 128])
def test_any_invertible_rotation(D: int, dtype: torch.dtype, tables: bool) -> None:
    """Not orthogonal, entries from 1e-4 to 1e2, columns of different size; centroids are rotated vectors."""
    H, T = 2, 1024
    rotation = torch.randn(H, D, D, device=DEVICE) * 10.0 ** (4 * torch.rand(H, 1, D, device=DEVICE) - 2)
    x = torch.randn(1, H, T, D, device=DEVICE).to(dtype)
    rotated = (x[0, :, :256].double() @ rotation.double()).float()  # [H, 256, D]
    centroids = rotated.unflatten(-1, (D // 2, 2)).transpose(1, 2).contiguous()
    codes = rows(x, centroids, rotation, tables)
    check_codes(codes, x, centroids, rotation)
    own = torch.arange(256, device=DEVICE)[None, None, :, None]  # a centroid's own vector, up to rounding
    assert int((codes[:, :, :256] != own).sum()) <= 1e-3 * codes[:, :, :256].numel()


def test_a_workspace_that_does_not_fit_is_named() -> None:
    x, codes = (
        torch.zeros(1, 1, 16, 128, device=DEVICE).half(),
        torch.zeros(1, 1, 16, 64, device=DEVICE).byte(),
    )
    small = torch.zeros(1000, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(
        RuntimeError, match=r"workspace \[1000\]: uint8 on the device, aligned, at least 525312"
    ):
        torch.ops.million.pq_encode(
            x, torch.zeros(1, 64, 256, 2, device=DEVICE), None, codes, None, small, 0, 16, 0
        )
    with pytest.raises(RuntimeError, match=r"it is for subspaces of one or two dims"):
        torch.ops.million.pq_encode(
            x,
            torch.zeros(1, 32, 256, 4, device=DEVICE),
            None,
            codes[..., :32].contiguous(),
            None,
            small,
            0,
            16,
            0,
        )
