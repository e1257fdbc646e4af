import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from million_cli.cache.window import ResidualWindow


@examples(50)
@given(lengths=st.lists(st.integers(1, 8), max_size=12), residual=st.just(8))
def test_ring_holds_the_newest_tokens_in_place(lengths, residual):
    k, v = torch.arange(2 * 200.0).view(2, 1, 1, 200, 1).expand(2, 3, 2, 200, 4)
    window = ResidualWindow(k, residual)
    ring = window.keys.data_ptr()
    end = 0
    for n in lengths:
        window.write(end, k[:, :, end : end + n], v[:, :, end : end + n])
        end += n
        start = max(0, end - residual)
        keys, values = window.read(start, end)
        assert len(keys) == len(values) <= 2
        assert torch.equal(torch.cat(keys, 2), k[:, :, start:end])
        assert torch.equal(torch.cat(values, 2), v[:, :, start:end])
        for t in range(start, end):
            assert torch.equal(window.keys[:, :, t % residual], k[:, :, t])
    assert window.keys.data_ptr() == ring


def test_take_copies_sequences_and_bytes_are_the_rings():
    like = torch.zeros(3, 2, 1, 4, dtype=torch.bfloat16)
    window = ResidualWindow(like, 32)
    assert window.nbytes == 2 * 3 * 2 * 32 * 4 * 2
    k = torch.arange(3).view(3, 1, 1, 1).expand(3, 2, 5, 4).bfloat16()
    window.write(0, k, -k)
    window.take(torch.tensor([2, 2, 0, 1]))
    (keys,), (values,) = window.read(0, 5)
    assert keys[:, 0, 0, 0].tolist() == [2, 2, 0, 1]
    assert values[:, 0, 4, 3].tolist() == [-2, -2, 0, -1]
