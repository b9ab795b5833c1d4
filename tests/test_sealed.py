"""Every kind of file is refused in the same words; what the system refuses proves no damage."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmodt import sealed
from harmodt.errors import UserError

KIND = sealed.Kind(
    name="a list of numbers",
    format="numbers",
    version=2,
    instead="name another file",
    again="count again",
    remedy="restore it, or count again",
)


@dataclass(frozen=True)
class Numbers:
    numbers: tuple[int, ...]


def write(path: Path, **values: object) -> None:
    """A file as `sealed.write` has to write it, made without it."""
    content = {"format": "numbers", "version": 2, **values}
    text = json.dumps(content, sort_keys=True).encode()
    path.write_text(json.dumps({**content, "crc32": f"{zlib.crc32(text):08x}"}))


def test_an_object_is_read_back_and_its_type_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    sealed.write(path, {"format": "numbers", "version": 2, "numbers": [3, 4]})
    written = path.read_bytes()
    write(path, numbers=[3, 4])
    assert json.loads(written) == json.loads(path.read_bytes())
    assert sealed.read(path, Numbers, KIND) == Numbers((3, 4))
    assert sealed.read(path, dict, KIND) == {"format": "numbers", "version": 2, "numbers": [3, 4]}
    write(path, numbers=["3"])
    with pytest.raises(UserError, match=r"a\.json is damaged \(Expected `int`.*\): restore it, or"):
        sealed.read(path, Numbers, KIND)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"is damaged \(it is not JSON.*\): restore it, or count again$"),
        (b"\xff", r"is damaged \(it is not JSON"),
        (b'{"a": NaN}', r"is damaged \(it is not JSON: NaN is not finite\)"),
        (b'{"a": 1e999}', r"is damaged \(it is not JSON: 1e999 is not finite\)"),
        (b"[" * 100_000, r"is damaged \(it is not JSON"),
        (b"[1]", "is not a list of numbers: name another file$"),
        (b'{"format": "letters"}', "is not a list of numbers: name another file$"),
        (b'{"format": "numbers", "version": 1}', "is of version 1, and this HarmoDT reads version "
         "2: count again, or use the HarmoDT that wrote it$"),
        (b'{"format": "numbers", "version": 2}', r"is damaged \(its checksum fails\): restore it"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_object_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        sealed.read(path, Numbers, KIND)
    assert str(refused.value).startswith(str(path)) and len(str(refused.value)) < 500


@given(st.data())
def test_a_changed_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    path = tmp_path_factory.mktemp("sealed") / "a.json"
    write(path, numbers=[30, 40])
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        assert sealed.read(path, Numbers, KIND) == Numbers((30, 40))  # a space may have changed


def test_a_line_ends_with_the_checksum_of_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = sealed.seal_line({"step": 3, "loss": 0.5})
    rest = b'{"step": 3, "loss": 0.5}'
    assert line == f'{rest.decode()[:-1]}, "crc32": "{zlib.crc32(rest):08x}"}}\n'
    path.write_text(line + line[:-5])
    assert sealed.read_lines(path, dict[str, float], "delete it") == [
        (f"line 1 of {path}", {"step": 3, "loss": 0.5}, line.encode())
    ]
    path.write_text(line + line.replace("3", "4", 1) + line)
    with pytest.raises(UserError, match=f"^line 2 of {path} is damaged .its checksum fails.: del"):
        sealed.read_lines(path, dict[str, float], "delete it")
    path.write_text(line)
    with pytest.raises(UserError, match=f"^line 1 of {path} is damaged .Expected `str`.*: del"):
        sealed.read_lines(path, dict[str, str], "delete it")


def test_a_binary_file_is_checked_against_what_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"123456789")
    assert sealed.read_binary(path, "cbf43926", "make it again") == b"123456789"
    with pytest.raises(UserError, match=r"a\.bin is damaged .its checksum fails.: make it again$"):
        sealed.read_binary(path, "cbf43927", "make it again")
    path.unlink()
    with pytest.raises(UserError, match=r"a\.bin is missing: make it again$"):
        sealed.read_binary(path, "cbf43926", "make it again")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_the_system_refuses_is_no_damage(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write(path, numbers=[3])

    def refuse(name: object, *_: object) -> int:
        raise OSError(number, os.strerror(number), name)

    monkeypatch.setattr(os, "open", refuse)
    for read in (
        lambda: sealed.read(path, Numbers, KIND),
        lambda: sealed.read_binary(path, "cbf43926", "make it again"),
        lambda: sealed.read_lines(path, dict[str, float], "delete it"),
    ):
        with pytest.raises(OSError, match=os.strerror(number)) as refused:
            read()
        assert refused.value.errno == number
