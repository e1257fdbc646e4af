"""The ops exist without a GPU: schemas say what is written, fakes let a compiler trace them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from million_cli.ops import compiled

WRITTEN = {
    "pq_encode": {"codes", "workspace"},
    "append": {"key_window", "value_window", "key_codes", "value_codes"},
    "paged_decode": {"workspace", "out"},
    "contiguous_decode": {"workspace", "out"},
}


@pytest.mark.parametrize("name", list(WRITTEN))
def test_schema_names_what_is_written(name: str) -> None:
    schema = getattr(torch.ops.million, name).default._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == WRITTEN[name]
    assert not schema.returns


def test_fake_encode_traces() -> None:
    with FakeTensorMode():
        x, codes = torch.empty(1, 2, 16, 128), torch.empty(1, 2, 16, 64, dtype=torch.uint8)
        torch.ops.million.pq_encode(x, torch.empty(1, 64, 256, 2), None, codes, None, None, 0, 16, 0)


def test_code_major_puts_centroids_in_rows() -> None:
    centroids = torch.randn(2, 4, 256, 2)
    table = compiled.code_major(centroids)
    assert table.shape == (2, 256, 8)
    assert table.dtype == torch.float16
    assert torch.equal(table[1, 7].view(4, 2), centroids[1, :, 7].half())


def test_load_explains_itself_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiled.load.cache_clear()
    with pytest.raises(compiled.KernelsUnavailable, match=r"CUDA"):
        compiled.load()
