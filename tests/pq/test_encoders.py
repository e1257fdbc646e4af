"""Encoders against each other: torch defines the codes, KeOps and FAISS find the same ones."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from code_cases import B, H, T, distances, make

from million_cli.cache.contiguous import ContiguousStore
from million_cli.cache.store import CodeStore
from million_cli.errors import UserError
from million_cli.pq import Setup, encode, train_codebook
from million_cli.pq.codebook import LayerPQ
from million_cli.recipe import ENCODERS
from million_cli.spec import CodeSpec, ModelFingerprint, WindowSpec

# KeOps compiles: its tests are collected where there is a compiler.
HERE = [name for name in ENCODERS if name != "keops" or shutil.which("g++")]
OTHERS = [name for name in HERE if name != "torch"]
DTYPES = {
    "torch": (torch.float32, torch.float64),
    "keops": (torch.float32, torch.float64),
    "faiss": (torch.float32,),
}


def cases(encoders: list[str]) -> list[tuple[str, torch.dtype]]:
    return [(name, dtype) for name in encoders for dtype in DTYPES[name]]


@pytest.mark.parametrize(("encoder", "dtype"), cases(HERE))
def test_ties_go_to_the_lowest_index(encoder: str, dtype: torch.dtype) -> None:
    """On a coarse grid of integers every distance is exact and most are tied."""
    torch.manual_seed(0)
    spec = CodeSpec(8, 4, 8)
    pq = LayerPQ(spec, torch.randint(-2, 3, (H, 4, 256, 2)).float())
    x = torch.randint(-3, 4, (B, H, T, 8)).to(dtype)
    exact = distances(x, pq)
    lowest = (exact == exact.amin(-1, keepdim=True)).long().argmax(-1)
    assert torch.equal(encode(x, pq, encoder).long(), lowest)


@pytest.mark.parametrize(("encoder", "dtype"), cases(OTHERS))
@pytest.mark.parametrize(("nbits", "Hc", "Hr"), [(8, H, 0), (11, 1, 1)])
def test_encoders_agree_except_at_ties(
    encoder: str, dtype: torch.dtype, nbits: int, Hc: int, Hr: int
) -> None:
    pq, x = make(8, 4, nbits, Hc, Hr)
    x = x.repeat(1, 1, 50, 1).to(dtype)
    x += torch.randn_like(x)
    ours, theirs = encode(x, pq), encode(x, pq, encoder)
    assert ours.dtype == theirs.dtype
    differ = ours.long() != theirs.long()
    if dtype == torch.float64:
        assert not differ.any()
    exact = distances(x, pq)
    a, b = (exact.gather(-1, codes.long()[..., None])[..., 0][differ] for codes in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    assert differ.double().mean() < 1e-3


@pytest.mark.parametrize("encoder", OTHERS)
def test_caches_and_trainings_get_the_same_codes(encoder: str) -> None:
    """A coarse grid again, where distances are exact: the store's codes and the card's errors are equal."""
    torch.manual_seed(1)
    spec = CodeSpec(8, 4, 5)
    pq = LayerPQ(spec, torch.randint(-2, 3, (H, 4, 32, 2)).float())
    k, v = torch.randint(-3, 4, (2, B, H, 70, 8)).float()

    def coded(store: CodeStore) -> list[torch.Tensor]:
        store.append(0, k, v)
        return [reader.read(0, store.coded()) for reader in store.codes(0)]

    window = WindowSpec(16, 32)
    stores = (ContiguousStore([(pq, pq)], window, encoder=name) for name in ("torch", encoder))
    assert all(map(torch.equal, *map(coded, stores)))

    setup = Setup().override(
        "quantizer.keys.nbits=3", "quantizer.values.nbits=3", "train.iterations=2", "quantizer.keys.M=4"
    )
    fingerprint = ModelFingerprint("llama", 2, (0, 1), H, 8, "")
    cards = [
        train_codebook(
            *torch.randn(2, 2, H, 400, 8, generator=torch.Generator().manual_seed(2)),
            fingerprint,
            setup.override(f"train.encoder={name}"),
            calibration="noise",
            calibration_sha256="",
            tokens=400,
        ).meta
        for name in ("torch", encoder)
    ]
    torch.testing.assert_close(cards[0].key_error, cards[1].key_error, rtol=1e-6, atol=0)
    torch.testing.assert_close(cards[0].value_error, cards[1].value_error, rtol=1e-6, atol=0)
    assert cards[1].recipe.train.encoder == encoder


def test_an_unknown_encoder_is_refused() -> None:
    pq, x = make(8, 4, 6)
    with pytest.raises(UserError, match="encoder=numpy: accepted are torch, keops, faiss"):
        encode(x, pq, "numpy")


def test_faiss_refuses_float64() -> None:
    pq, x = make(8, 4, 6)
    with pytest.raises(UserError, match="encoder=faiss computes in float32"):
        encode(x, pq, "faiss")


@pytest.mark.parametrize(
    ("encoder", "hide", "message"),
    [
        (
            "keops",
            "os.environ.update(PATH=''); os.environ.pop('CXX', None)",
            "encoder=keops needs the compiler g++",
        ),
        ("keops", "sys.modules['pykeops'] = None", "encoder=keops needs PyKeOps"),
        ("faiss", "sys.modules['faiss'] = None", "encoder=faiss needs FAISS"),
    ],
)
def test_an_encoder_that_cannot_work_says_so_in_one_line(encoder: str, hide: str, message: str) -> None:
    code = f"""if True:
        import os, sys
        from million_cli.errors import UserError
        from million_cli.pq import Setup
        {hide}
        try:
            Setup().override("train.encoder={encoder}")
        except UserError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(message), done.stderr
    assert done.stdout.count("\n") == 1


if "keops" in HERE:

    def test_keops_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
        pq, x = make(8, 4, 2)
        encode(x, pq, "keops")
        assert capfd.readouterr().out == ""
