"""The engine on a CPU: its tokens are those of `generate`, its steps can be captured and replayed.

Long because every property is checked with the same caches, captures and references.
"""

from __future__ import annotations

import pytest
import torch
from device_ops import DeviceOps
from tape_graphs import TapeGraphs
from tiny_models import ARCHITECTURES, WINDOW, codebook_for, random_ids, tiny_model
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from million_cli.engine.dense import DenseCache
from million_cli.engine.engine import Engine
from million_cli.engine.sampler import Sampler
from million_cli.errors import UserError
from million_cli.hf.cache import DynamicPQCache, PagedPQCache
from million_cli.hf.select import Kernels

FULL = [name for name in ARCHITECTURES if not name.startswith("gemma")]
ON_DEVICE = Kernels(lambda query: None, DeviceOps)


def pq_cache(kind: str = "paged", architecture: str = "llama", compute: str = "kernel", **options) -> Cache:
    cls = PagedPQCache if kind == "paged" else DynamicPQCache
    kernels = {"compute": "kernel", "kernels": ON_DEVICE} if compute == "kernel" else {"compute": "torch"}
    return cls(tiny_model(architecture), codebook_for(architecture), WINDOW, **kernels, **options)


def make(kind: str, architecture: str = "llama", length: int = 400) -> Cache:
    if kind == "dense":
        return DenseCache(tiny_model(architecture), length)
    if kind == "dynamic":
        return DynamicCache(config=tiny_model(architecture).config)
    store, _, compute = kind.partition(" ")
    return pq_cache(store, architecture, compute or "kernel")


def padded(B: int, T: int, *padding: int) -> tuple[Tensor, Tensor]:
    ids, mask = random_ids(B, T), torch.ones(B, T, dtype=torch.long)
    for row, n in enumerate(padding):
        ids[row, :n], mask[row, :n] = 0, 0
    return ids, mask


def tokens_of_generate(cache: Cache, ids: Tensor, n: int, mask: Tensor | None = None, architecture="llama"):
    mask = torch.ones_like(ids) if mask is None else mask
    output = tiny_model(architecture).generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=n, do_sample=False, eos_token_id=None
    )
    return output[:, ids.shape[1] :].tolist()


def tokens_of_engine(engine: Engine, ids: Tensor, n: int, mask: Tensor | None = None):
    return [list(row) for row in zip(*engine.generate(ids, mask, max_new_tokens=n), strict=True)]


def reference(kind: str, architecture: str = "llama") -> Cache:
    if kind in ("dense", "dynamic"):
        return DynamicCache(config=tiny_model(architecture).config)
    return pq_cache(architecture=architecture, compute="torch")


@pytest.mark.parametrize("graphs", [False, True], ids=["steps", "graph"])
@pytest.mark.parametrize("kind", ["paged", "contiguous", "dense"])
@pytest.mark.parametrize("padding", [(), (0, 7, 30)], ids=["even", "padded"])
def test_tokens_are_those_of_generate(kind, padding, graphs):
    ids, mask = padded(3, 45, *padding)
    engine = Engine(tiny_model(), make(kind), graphs=TapeGraphs() if graphs else None)
    assert tokens_of_engine(engine, ids, 60, mask) == tokens_of_generate(reference(kind), ids, 60, mask)
    assert engine.mode == ("graph" if graphs else "steps")
    assert engine.notes == []


@pytest.mark.parametrize("architecture", FULL)
@pytest.mark.parametrize("kind", ["paged", "dense"])
def test_every_architecture_with_full_attention(architecture, kind):
    ids, mask = padded(2, 40, 0, 9)
    model = tiny_model(architecture)
    engine = Engine(model, make(kind, architecture), graphs=TapeGraphs())
    expected = tokens_of_generate(reference(kind, architecture), ids, 30, mask, architecture)
    assert tokens_of_engine(engine, ids, 30, mask) == expected
    assert engine.mode == "graph"


@pytest.mark.parametrize("kind", ["dynamic", "paged torch", "contiguous torch"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text"])
def test_caches_without_steps_go_through_their_layers(kind, architecture):
    ids, mask = padded(2, 45, 0, 9)
    engine = Engine(tiny_model(architecture), make(kind, architecture))
    expected = tokens_of_generate(reference(kind, architecture), ids, 40, mask, architecture)
    assert tokens_of_engine(engine, ids, 40, mask) == expected
    assert engine.mode == "layers"
    assert "through the cache's layers" in engine.notes[0]


@pytest.mark.parametrize("kind", ["paged", "contiguous", "dense"])
def test_a_replayed_step_is_the_eager_step(kind):
    """Teacher-forced over 12 pages of tokens: the same logits, and in the end the same codes."""
    ids = random_ids(2, 250)
    graphs = TapeGraphs()
    tape, eager = (Engine(tiny_model(), make(kind), graphs=g) for g in (graphs, None))
    for engine in (tape, eager):
        engine.prefill(ids[:, :50], new_tokens=200)
    for t in range(50, 250):
        for engine in (tape, eager):
            engine.step(ids[:, t])
        torch.testing.assert_close(tape.logits, eager.logits, rtol=1e-12, atol=1e-12)
    if kind != "dense":
        for ours, theirs in zip(tape.cache.store.codes(1), eager.cache.store.codes(1), strict=True):
            assert ours.length == theirs.length == WINDOW.coded_length(250)
            assert torch.equal(ours.read(0, ours.length), theirs.read(0, theirs.length))
        assert graphs.captured == 1


def test_a_growing_pool_is_captured_anew():
    ids = random_ids(2, 200)
    graphs = TapeGraphs()
    engine = Engine(tiny_model(), make("paged"), graphs=graphs)
    expected = tokens_of_generate(reference("paged"), ids[:, :40], 160)
    engine.prefill(ids[:, :40])  # how long the text will be is not said
    tokens = [engine.step().clone() for _ in range(159)]
    assert torch.stack(tokens, 1).tolist() == [row[1:] for row in expected]
    assert graphs.captured > 1


def test_a_text_of_known_length_takes_its_memory_once():
    graphs = TapeGraphs()
    engine = Engine(tiny_model(), make("paged"), graphs=graphs)
    list(engine.generate(random_ids(3, 200), max_new_tokens=100))
    memory = engine.cache.memory()
    assert memory["pool_reserved"] == 0
    assert graphs.captured == 1


def test_an_exhausted_pool_goes_on_contiguously():
    ids = random_ids(2, 40)
    cache = pq_cache(max_pages=6)
    engine = Engine(tiny_model(), cache, graphs=TapeGraphs())
    assert tokens_of_engine(engine, ids, 100) == tokens_of_generate(reference("paged"), ids, 100)
    assert [f.got for f in cache.fallbacks] == ["contiguous kernel"]
    assert engine.mode == "graph"


@pytest.mark.parametrize("good", [3, 50])
def test_a_failing_kernel_is_given_up(good):
    ids = random_ids(2, 40)
    kernels = Kernels(lambda query: None, lambda store: DeviceOps(store, good=good))
    cache = PagedPQCache(tiny_model(), codebook_for(), WINDOW, compute="kernel", kernels=kernels)
    engine = Engine(tiny_model(), cache, graphs=None)
    assert tokens_of_engine(engine, ids, 60) == tokens_of_generate(reference("paged"), ids, 60)
    assert engine.mode == "layers"
    assert "illegal instruction" in str(cache.fallbacks[0])


def test_what_cannot_be_captured_runs_step_by_step():
    class HostReads(DeviceOps):
        def append(self, layer, keys, values):
            assert int(layer.lengths[0]) > 0
            super().append(layer, keys, values)

    cache = PagedPQCache(
        tiny_model(), codebook_for(), WINDOW, compute="kernel", kernels=Kernels(lambda q: None, HostReads)
    )
    engine = Engine(tiny_model(), cache, graphs=TapeGraphs())
    ids = random_ids(2, 40)
    assert tokens_of_engine(engine, ids, 40) == tokens_of_generate(reference("paged"), ids, 40)
    assert engine.mode == "steps"
    assert "cannot be captured" in engine.notes[0]


def test_two_engines_take_turns():
    ids = random_ids(2, 60)
    engines = {
        (kind, seed): Engine(tiny_model(seed=seed), _cache(kind, seed), graphs=TapeGraphs())
        for kind in ("paged", "dense")
        for seed in (0, 1)
    }
    runs = {key: engine.generate(ids, max_new_tokens=40) for key, engine in engines.items()}
    made = {key: [] for key in runs}
    for _ in range(40):
        for key, run in runs.items():
            made[key].append(next(run))
    for (kind, seed), tokens in made.items():
        alone = Engine(tiny_model(seed=seed), _cache(kind, seed), graphs=None)
        assert tokens == list(alone.generate(ids, max_new_tokens=40))


def _cache(kind: str, seed: int) -> Cache:
    from random_codebook import random_codebook

    model = tiny_model(seed=seed)
    if kind == "dense":
        return DenseCache(model, 200)
    return PagedPQCache(
        model, random_codebook(model, (8, 5), (4, 8)), WINDOW, compute="kernel", kernels=ON_DEVICE
    )


def test_the_next_text_uses_the_graph_of_the_last():
    graphs = TapeGraphs()
    engine = Engine(tiny_model(), make("paged"), graphs=graphs)
    first, second = random_ids(2, 60), random_ids(2, 45, seed=3)
    for ids in (first, second, first):
        assert tokens_of_engine(engine, ids, 50) == tokens_of_generate(reference("paged"), ids, 50)
        engine.reset()
    assert graphs.captured == 1


@pytest.mark.parametrize("kind", ["paged", "dense"])
def test_chunks_see_what_the_cache_has_made_of_earlier_ones(kind):
    ids, mask = padded(2, 100, 0, 13)
    engine = Engine(tiny_model(), make(kind), graphs=None)
    engine.prefill(ids, mask, chunk=40)
    expected = reference(kind)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for start in (0, 40, 80):
            stop = min(start + 40, 100)
            output = tiny_model()(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=expected,
            )
    torch.testing.assert_close(engine.logits, output.logits[:, -1], rtol=1e-10, atol=1e-10)
    assert engine.chunk == 40


def test_a_prompt_too_long_for_memory_is_read_in_chunks(monkeypatch):
    model, ids = tiny_model(), random_ids(1, 1000)
    read = type(model.model).forward

    def small(self, input_ids=None, **kwargs):
        if input_ids.shape[1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr("million_cli.engine.engine.LEAST_CHUNK", 200)
    monkeypatch.setattr(type(model.model), "forward", small)
    engine = Engine(model, DenseCache(model, 1010))
    token = engine.prefill(ids, new_tokens=10)
    assert (engine.chunk, engine.notes) == (250, ["prefill in chunks of 250"])
    monkeypatch.undo()
    assert token.tolist() == [tokens_of_generate(reference("dense"), ids, 1)[0][0]]


def test_sequences_end_at_their_own_end():
    ids = random_ids(2, 50)
    engine = Engine(tiny_model(), make("dense"), graphs=None)
    free = tokens_of_engine(engine, ids, 40)
    end = free[0][5]
    engine.reset()
    rows = [list(r) for r in zip(*engine.generate(ids, max_new_tokens=40, eos=[end], pad=0), strict=True)]
    for row, unbound in zip(rows, free, strict=True):
        stop = unbound.index(end) + 1 if end in unbound else 40
        assert row == (unbound[:stop] + [0] * 40)[: len(row)]
    assert len(rows[0]) == max((r.index(end) + 1) if end in r else 40 for r in free)


@pytest.mark.parametrize("bucket", [1, 32])
def test_dense_buckets_mask_what_is_not_there(bucket):
    ids = random_ids(2, 45)
    graphs = TapeGraphs()
    engine = Engine(tiny_model(), make("dense"), graphs=graphs, bucket=bucket)
    assert tokens_of_engine(engine, ids, 60) == tokens_of_generate(reference("dense"), ids, 60)
    assert graphs.captured == (58 if bucket == 1 else 3)


@pytest.mark.parametrize("kind", ["paged", "dense"])
def test_capturing_ahead_changes_nothing(kind):
    ids = random_ids(2, 45)
    graphs = TapeGraphs()
    engine = Engine(tiny_model(), make(kind), graphs=graphs)
    tokens = [engine.prefill(ids, new_tokens=30).tolist(), engine.step().tolist()]
    engine.capture(20)
    captured = graphs.captured
    tokens += [engine.step().tolist() for _ in range(20)]
    assert graphs.captured == captured == (20 if kind == "dense" else 1)
    expected = tokens_of_generate(reference(kind), ids, 22)
    assert [list(row) for row in zip(*tokens, strict=True)] == expected


def test_compiled_steps_are_the_same():
    ids, mask = padded(2, 45, 0, 7)
    expected = {kind: tokens_of_generate(reference(kind), ids, 30, mask) for kind in ("paged", "dense")}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for kind in ("paged", "dense"):
        engine = Engine(tiny_model(), make(kind), compile="default", graphs=None)
        assert tokens_of_engine(engine, ids, 30, mask) == expected[kind]
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1  # one compilation for both
    assert not counters["graph_break"]


def test_sampling_draws_from_the_softmax():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(20_000, 1)
    drawn = torch.bincount(Sampler(temperature=0.7)(logits), minlength=4) / 20_000
    torch.testing.assert_close(drawn, (logits[0] / 0.7).softmax(-1), atol=0.015, rtol=0)
    top = torch.bincount(Sampler(temperature=0.7, top_k=2)(logits), minlength=4) / 20_000
    assert top[0] == top[3] == 0
    assert Sampler()(logits[:2]).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [2]), (0.643, [2]), (0.645, [1, 2]), (0.880, [1, 2]), (0.882, [0, 1, 2]), (1.0, [0, 1, 2, 3])],
)
def test_top_p_draws_among_the_fewest_tokens_that_hold_it(top_p, kept):
    # Probabilities 0.0871, 0.2369, 0.6439, 0.0321: the largest sum to 0.6439, 0.8808, 0.9679, 1.
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = Sampler(temperature=1.0, top_p=top_p)(logits.repeat(20_000, 1)).bincount(minlength=4) / 20_000
    expected = torch.zeros(4)
    expected[kept] = logits[kept].softmax(-1)
    torch.testing.assert_close(drawn, expected, atol=0.015, rtol=0)


def test_mistakes_are_named():
    model = tiny_model()
    with pytest.raises(UserError, match="compile=fast: accepted are none, default, tuned"):
        Engine(model, make("dense"), compile="fast")
    with pytest.raises(UserError, match="padding on the left"):
        Engine(model, make("dense")).prefill(random_ids(1, 8), torch.tensor([[1] * 7 + [0]]))
    with pytest.raises(UserError, match="made for 10"):
        Engine(model, make("dense", length=10)).prefill(random_ids(1, 11))
    engine = Engine(model, make("dense", length=10))
    engine.prefill(random_ids(1, 10))
    with pytest.raises(UserError, match="made for 10"):
        engine.step()
    with pytest.raises(UserError, match="full attention in every layer"):
        DenseCache(tiny_model("gemma3_text"), 10)
    for mistake in ({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}):
        ((name, value),) = mistake.items()
        with pytest.raises(UserError, match=f"{name}={value}: accepted are"):
            Sampler(**mistake)


def turns_of_generate(cache: Cache, first: Tensor, second: Tensor, n: int, mask: Tensor | None = None):
    """The new tokens of two turns, by transformers; the second prompt follows the first answer."""
    model, mask = tiny_model(), torch.ones_like(first) if mask is None else mask
    options = {"past_key_values": cache, "max_new_tokens": n, "do_sample": False, "eos_token_id": None}
    one = model.generate(first, attention_mask=mask, **options)
    text = torch.cat([one, second], 1)
    mask = torch.nn.functional.pad(mask, (0, text.shape[1] - first.shape[1]), value=1)
    two = model.generate(text, attention_mask=mask, **options)
    return one[:, first.shape[1] :].tolist(), two[:, text.shape[1] :].tolist()


@pytest.mark.parametrize("graphs", [False, True], ids=["steps", "graph"])
@pytest.mark.parametrize("kind", ["paged", "contiguous", "dense", "dynamic", "paged torch"])
def test_a_second_prompt_is_a_new_text_unless_it_is_said_to_continue(kind, graphs):
    first, mask = padded(2, 45, 0, 9)
    second = random_ids(2, 33, seed=5)
    engine = Engine(tiny_model(), make(kind), graphs=TapeGraphs() if graphs else None)
    one = tokens_of_engine(engine, first, 40, mask)
    assert engine.length == engine.cache.get_seq_length() == 45 + 39
    again = tokens_of_engine(engine, second, 40)  # without a reset
    assert again == tokens_of_generate(reference(kind), second, 40)
    assert engine.length == engine.cache.get_seq_length() == 33 + 39
    assert tokens_of_engine(engine, first, 40, mask) == one
    turn = [
        list(r) for r in zip(*engine.generate(second, max_new_tokens=40, continue_text=True), strict=True)
    ]
    assert [one, turn] == list(turns_of_generate(reference(kind), first, second, 40, mask))
    assert engine.length == engine.cache.get_seq_length() == 45 + 40 + 33 + 39


@pytest.mark.parametrize("kind", ["paged", "dense"])
def test_a_turn_follows_an_answer_that_ended_early(kind):
    first, second = random_ids(1, 45), random_ids(1, 33, seed=5)
    engine = Engine(tiny_model(), make(kind), graphs=None)
    free = tokens_of_engine(engine, first, 30)[0]
    end = free[7]
    stop = free.index(end) + 1
    answer = [token for (token,) in engine.generate(first, max_new_tokens=30, eos=[end])]
    assert answer == free[:stop]
    turn = [token for (token,) in engine.generate(second, max_new_tokens=20, continue_text=True)]
    expected = reference(kind)
    text = torch.cat([first, torch.tensor([answer]), second], 1)
    with torch.no_grad():
        tiny_model()(first, past_key_values=expected)
        for t in range(45, 45 + stop):
            tiny_model()(text[:, t : t + 1], past_key_values=expected)
    assert turn == tokens_of_generate(expected, text, 20)[0]


@pytest.mark.parametrize("kind", ["paged", "dense", "dynamic"])
def test_a_cache_that_was_filled_elsewhere_is_continued_or_refused(kind):
    text = random_ids(2, 80)
    cache = make(kind)
    for holder in (cache, expected := reference(kind)):
        with torch.no_grad():
            tiny_model()(text[:, :50], past_key_values=holder)
    engine = Engine(tiny_model(), cache, graphs=TapeGraphs())
    with pytest.raises(UserError, match="already holds 50 tokens: continue_text=True"):
        engine.prefill(text)
    run = engine.generate(text[:, 50:], max_new_tokens=30, continue_text=True)
    assert [list(row) for row in zip(*run, strict=True)] == tokens_of_generate(expected, text, 30)
    assert engine.length == cache.get_seq_length() == 80 + 29


@pytest.mark.parametrize("kind", ["paged", "dense", "dynamic"])
def test_the_next_text_may_come_in_another_batch(kind):
    engine = Engine(tiny_model(), make(kind), graphs=TapeGraphs())
    for B in (2, 3, 1):
        ids = random_ids(B, 45, seed=B)
        assert tokens_of_engine(engine, ids, 30) == tokens_of_generate(reference(kind), ids, 30)


@pytest.mark.parametrize("kind", ["paged", "dense"])
def test_turns_that_cannot_be_right_are_refused(kind):
    engine = Engine(tiny_model(), make(kind), graphs=None)
    ids, turn = random_ids(2, 40), random_ids(2, 10, seed=2)
    with pytest.raises(UserError, match="no text to continue"):
        engine.prefill(turn, continue_text=True)
    with pytest.raises(UserError, match="no text yet"):
        engine.step()
    free = tokens_of_engine(engine, ids, 30)
    ends = [t for t in free[0] if t not in free[1]][:1]
    list(engine.generate(ids, max_new_tokens=30, eos=ends))
    with pytest.raises(UserError, match="ended at different tokens"):
        engine.prefill(turn, continue_text=True)
    engine.prefill(ids)
    with pytest.raises(UserError, match="next turn without padding"):
        engine.prefill(turn, torch.zeros_like(turn), continue_text=True)
    with pytest.raises(UserError, match="batch=1: the text that continues is a batch of 2"):
        engine.prefill(turn[:1], continue_text=True)
    engine.cache.crop(-5)
    for use in (engine.step, lambda: engine.prefill(turn, continue_text=True)):
        with pytest.raises(UserError, match="holds 35 tokens, the engine has read 40"):
            use()
    assert engine.prefill(ids).shape == (2,)  # a new text is always right
