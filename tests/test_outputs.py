"""Files of results: which are refused before the work, and that a reader never sees half of one."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from pmc_fast.errors import UserError
from pmc_fast.outputs import check_file, write_file


@pytest.mark.parametrize(
    "name, complaint",
    [
        (".", "is a folder; want a file"),
        ("missing/out.json", "missing is no folder"),
        ("notes.txt/out.json", "notes.txt is no folder"),
        ("n" * 300, "cannot be written: File name too long"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, complaint):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="^--json: .*" + complaint):
        check_file(tmp_path / name, "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("forbidden", ["out.json", "."])
def test_missing_permission_is_noticed(tmp_path, monkeypatch, forbidden):
    (tmp_path / "out.json").write_text("old")
    check_file(tmp_path / "out.json", "--json")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / forbidden)
    with pytest.raises(UserError, match="out.json cannot be written"):
        check_file(tmp_path / "out.json", "--json")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    write_file(path, "old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="out.json cannot be written: No space left"):
        write_file(path, "new")
    assert path.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out.json"]
    monkeypatch.undo()
    write_file(path, "new")
    assert path.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to("folder/out.json")
    for text in ("new", "newer"):  # where nothing was, and over a file
        check_file(link, "--json")
        write_file(link, text)
        assert link.is_symlink() and (tmp_path / "folder" / "out.json").read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "link.json", "out.json"]
    link.unlink()
    link.symlink_to("missing/out.json")
    with pytest.raises(UserError, match="^--json: .*missing is no folder"):
        check_file(link, "--json")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm to write to")
def test_a_file_in_the_systems_memory_is_replaced_like_any_other():
    with TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "out.json"
        write_file(path, "old")
        held = path.stat().st_ino
        with path.open() as reader:  # who holds the number of the old one
            write_file(path, "new")
            assert path.read_text() == "new" and reader.read() == "old" and path.stat().st_ino != held


def test_the_systems_names_stay(tmp_path):
    with open(tmp_path / "out.json", "w") as file:
        name = f"/proc/self/fd/{file.fileno()}"
        check_file(name, "--json")
        write_file(name, "text")
    assert (tmp_path / "out.json").read_text() == "text" and os.listdir(tmp_path) == ["out.json"]


def test_a_pipe_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_file(tmp_path / "pipe", "--json")
        write_file(tmp_path / "pipe", "text")
        assert os.read(reader, 9) == b"text" and (tmp_path / "pipe").is_fifo()
    finally:
        os.close(reader)
