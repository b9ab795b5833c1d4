from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest
from runs import ended_process

from harmodt import files
from harmodt.errors import UserError
from harmodt.files import (
    check_writable,
    clear_temporaries,
    names_in,
    owned,
    replace_directory,
    write_atomic,
    write_bytes,
    write_json,
)


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a"
    write_bytes(path, b"old")

    def fail(file):
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_goes_and_what_living_ones_write_stays(tmp_path):
    ended = ended_process()
    names = [f".a.json.{n}.tmp" for n in (ended, os.getpid(), 1, 0, 10**12, "old")]
    others = [f".b.json.{ended}.tmp", f".a.json.csv.{ended}.tmp", f".a.json.{ended}", "a.json"]
    for name in names + others:
        (tmp_path / name).touch()
    clear_temporaries(tmp_path / "a.json")
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], *others}


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    replace, sync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("replace"), replace(*names)))
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("sync"), sync(file)))
    write_bytes(tmp_path / "a", b"content")
    assert events == ["sync", "replace", "sync"]


def test_a_directory_takes_the_place_of_another(tmp_path):
    for name, text in (("old", "1"), ("new", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    replace_directory(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "2"
    assert not (tmp_path / "new").exists()


def test_a_directory_has_one_owner_at_a_time(tmp_path):
    program = (
        "import sys; from pathlib import Path; from harmodt.files import owned\n"
        "with owned(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "a")], **pipe) as other:
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(UserError, match=f"a is in use .* process {other.pid}:"):
            owned(tmp_path / "a").__enter__()
        other.kill()
    assert (tmp_path / "a" / ".lock").exists()
    with owned(tmp_path / "a"):
        assert (tmp_path / "a" / ".lock").read_text() == str(os.getpid())
    assert list((tmp_path / "a").iterdir()) == []


def test_names_are_none_without_a_directory_and_an_error_where_it_is_refused(tmp_path, monkeypatch):
    for name in ("b", "a"):
        (tmp_path / name).touch()
    assert names_in(tmp_path) == ["a", "b"]
    assert names_in(tmp_path / "none") == names_in(tmp_path / "a") == []

    def refuse(path):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(PermissionError):
        names_in(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_with_one_warning(
    tmp_path, monkeypatch, capsys, number
):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files, "_warned", False)
    for name in ("a", "b"):
        with owned(tmp_path / name):
            assert (tmp_path / name / ".lock").read_text() == str(os.getpid())
            (tmp_path / name / "file").touch()
        assert [path.name for path in (tmp_path / name).iterdir()] == ["file"]
    error = capsys.readouterr().err
    assert error.startswith(f"warning: the file system of {tmp_path / 'a'} has no locks")
    assert error.count("\n") == 1


def test_what_else_a_lock_meets_is_an_error(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input"), owned(tmp_path / "a"):
        pass
    monkeypatch.undo()
    with owned(tmp_path / "a"):
        pass


@pytest.mark.parametrize("there", [True, False])
def test_whether_a_directory_can_be_written_is_asked_without_a_trace(tmp_path, there):
    directory = tmp_path / "a" / "b"
    if there:
        directory.mkdir(parents=True)
        directory.joinpath(f".check.{ended_process()}.tmp").touch()  # of a kill
    check_writable(directory)
    assert list(tmp_path.rglob("*")) == ([tmp_path / "a", directory] if there else [])
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        check_writable(tmp_path / "file" / "c")


def test_a_directory_that_was_made_in_vain_goes_again(tmp_path):
    with pytest.raises(ValueError, match="refused"), owned(tmp_path / "a" / "b"):
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == []
    with owned(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()
