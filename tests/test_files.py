import io
import os
import stat
import subprocess
import sys

import pytest
import torch

from million_cli.errors import UserError
from million_cli.files import (
    atomic_path,
    read_safetensors,
    read_whole,
    write_bytes,
    write_safetensors,
    write_text,
)


def test_text_and_bytes_arrive_as_they_are(tmp_path):
    write_text(tmp_path / "new" / "folder" / "a.txt", "é\r\nb\n")
    write_bytes(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "new" / "folder" / "a.txt").read_bytes() == b"\xc3\xa9\r\nb\n"
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "new"]


def test_tensors_of_any_stride_and_metadata_come_back(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor([65535]).to(torch.uint16)}
    write_safetensors(path, tensors, {"k": "v"})
    loaded, metadata = read_safetensors(path)
    assert metadata == {"k": "v"}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["b"].dtype == torch.uint16


def test_a_new_file_has_ordinary_permissions(tmp_path):
    write_text(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def interrupted():
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == path.suffix
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write "):
        write_text(tmp_path / "file" / "a.txt", "")


@pytest.mark.parametrize("kind", ["bytes", "safetensors"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, kind):
    """The limit on a file's size stands for the disk: writing past it fails in the same call."""
    path = tmp_path / "a"
    path.write_text("old")
    code = f"""
import resource, torch
from million_cli.errors import UserError
from million_cli.files import write_bytes, write_safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    if {kind!r} == "bytes":
        write_bytes({str(path)!r}, bytes(10_000))
    else:
        write_safetensors({str(path)!r}, {{"x": torch.zeros(10_000)}})
except UserError as error:
    assert "\\n" not in str(error)
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {path}: ")
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_text() == "old"


def test_unreadable_tensors_are_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such file: "):
        read_safetensors(tmp_path / "missing")
    (tmp_path / "text").write_text("not tensors, and longer than eight bytes")
    with pytest.raises(UserError, match="text is not a readable safetensors file") as caught:
        read_safetensors(tmp_path / "text")
    assert "\n" not in str(caught.value)


def test_safetensors_files_are_as_readable_as_any_other(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    write_text(tmp_path / "b.txt", "")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b.txt").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.txt"]


def test_what_a_kill_leaves_is_removed_by_the_next_run_and_nothing_else_is(tmp_path):
    """A writer that lives keeps its temporary file; files of like names that are not ours stay too."""
    code = """
import os, signal, sys
from million_cli.files import atomic_path, write_text
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""
    (tmp_path / ".hidden").write_text("")
    (tmp_path / ".0123abcd.folder").mkdir()
    command = [sys.executable, "-c", code]
    subprocess.run([*command, tmp_path / "killed.csv", "killed"], capture_output=True)
    assert len(list(tmp_path.glob(".????????.killed.csv"))) == 1
    with subprocess.Popen(
        [*command, tmp_path / "alive.csv", "alive"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as alive:
        alive.stdout.readline()
        write = f"from million_cli.files import write_text; write_text({str(tmp_path / 'other')!r}, 'x')"
        subprocess.run([sys.executable, "-c", write], check=True)
        names = sorted(path.name.split(".")[-2:] for path in tmp_path.iterdir())
        assert names == [["", "hidden"], ["0123abcd", "folder"], ["alive", "csv"], ["other"]]
        alive.stdin.close()
    assert (tmp_path / "alive.csv").read_text() == "half"


def test_names_that_are_no_utf8_are_written_as_escapes(tmp_path):
    write_text(tmp_path / "a", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "a").read_text() == "caf\\udce9"


def test_reading_stops_at_the_limit():
    assert read_whole(io.BytesIO(bytes(5 << 20)), "x", 5 << 20) == bytes(5 << 20)
    with pytest.raises(UserError, match=r"^x holds more than 5 MiB, which is the limit$"):
        read_whole(io.BytesIO(bytes((5 << 20) + 1)), "x", 5 << 20)
