"""What tars are like in the wild: each file of a sample is resolved rightly, or the sample is named with the reason."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_qwenvl.commands import index_shards
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer, load_tokenizer
from megatron_qwenvl.data.shards.index import ShardIndex
from megatron_qwenvl.data.shards.index_builder import JOINT, build_index
from megatron_qwenvl.data.shards.listing import list_shards, unread_shards
from megatron_qwenvl.data.shards.members import GAP
from megatron_qwenvl.data.shards.samples import checksum, read_member, scan_shard
from megatron_qwenvl.data.shards.tar_header import BLOCK, normalise_name
from tests.unit.data.data_cases import png_image

VQA = json.dumps({"task": "vqa", "question": "q?", "answer": "a"}).encode()
RED, GREEN, BLUE = (png_image(colour=colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250)))
File = tuple[str, bytes] | tuple[tarfile.TarInfo, bytes]


def tar_bytes(*files: File, format_: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of named files and ready headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as tar:
        for name, data in files:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def index_of(path: Path, content: bytes) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Images of each usable sample by key, after a look at every byte that the index points to; reasons by key."""
    path.write_bytes(content)
    index = build_index(path, load_tokenizer())
    check_bytes(path, index)
    usable = {index.key(row): [info.name for info, _ in index.images(row)] for row in range(len(index))}
    keys, reasons = index.arrays["skipped_keys"], index.arrays["skipped_reasons"]
    return usable, {key.decode(): reason.decode() for key, reason in zip(keys, reasons, strict=True)}


def check_bytes(path: Path, index: ShardIndex) -> None:
    """Every place in the index holds the bytes that were checksummed."""
    with path.open("rb") as file:
        for row in range(len(index)):
            data = read_member(file.fileno(), index.text_member(row)[1])
            assert checksum([data]) == index.arrays["text_checksums"][row]
            images = [read_member(file.fileno(), member) for _, member in index.images(row)]
            assert checksum(images) == index.arrays["image_checksums"][row]


def caption(key: str, suffix: str = "png") -> list[File]:
    return [(f"{key}.{suffix}", RED), (f"{key}.txt", b"a red square")]


# ---- samples that are whole


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("0.jpg", "2.jpg", "1.webp"), ["0.jpg", "1.webp", "2.jpg"]),
        (("10.jpeg", "9.jpg", "1.png"), ["1.png", "9.jpg", "10.jpeg"]),
        (("00.JPG", "01.png", "002.jpeg"), ["00.JPG", "01.png", "002.jpeg"]),
        (("1.png", "png"), ["png", "1.png"]),
        (("b.png", "aa.jpg", "a.jpeg"), ["a.jpeg", "b.png", "aa.jpg"]),
        (("page10.png", "page9.jpg"), ["page9.jpg", "page10.png"]),
        (("\u00b2.png", "\u0661.jpg"), ["\u00b2.png", "\u0661.jpg"]),  # a power and an Arabic digit are words
    ],
)
def test_images_come_in_the_order_of_their_numbers(
    tmp_path: Path, names: tuple[str, ...], expected: list[str]
) -> None:
    files: list[File] = [("k.json", VQA), *((f"k.{name}", RED) for name in names)]
    assert index_of(tmp_path / "s.tar", tar_bytes(*files)) == ({"k": expected}, {})


def test_a_missing_number_is_noted_unless_a_dialogue_names_its_images(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    turns = [
        {"from": "user", "value": "<img>0.png</img><img>2.png</img>"},
        {"from": "assistant", "value": "a"},
    ]
    dialogue = json.dumps({"task": "chat", "conversations": turns}).encode()
    files = [("k.0.png", RED), ("k.2.png", BLUE), ("k.json", VQA)]
    files += [("d.0.png", RED), ("d.2.png", BLUE), ("d.json", dialogue)]
    (tmp_path / "s.tar").write_bytes(tar_bytes(*files))
    index = build_index(tmp_path / "s.tar", byte_level)
    assert [index.key(row) for row in range(len(index))] == ["k", "d"]
    assert (index.arrays["noted_keys"].tolist(), index.arrays["notes"].tolist()) == ([b"k"], [GAP.encode()])


def test_files_of_a_sample_may_stand_anywhere(tmp_path: Path) -> None:
    files: list[File] = [("a.json", VQA), ("b.1.png", GREEN), ("a.0.png", RED), ("b.json", VQA), ("./b.0.png", BLUE),
                         ("a.1.png", BLUE)]  # fmt: skip
    usable, skipped = index_of(tmp_path / "s.tar", tar_bytes(*files))
    assert (usable, skipped) == ({"a": ["0.png", "1.png"], "b": ["0.png", "1.png"]}, {})
    assert list(usable) == ["a", "b"]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_lead_to_the_bytes(tmp_path: Path, kind: bytes) -> None:
    stored = "d/k.0.png" if kind == tarfile.LNKTYPE else "k.0.png"
    files: list[File] = [special("d/k.1.png", kind, stored), special("d/k.2.png", kind, stored.replace("0", "1")),
                         ("d/k.0.png", RED), ("d/k.json", VQA)]  # fmt: skip
    path = tmp_path / "s.tar"
    assert index_of(path, tar_bytes(*files)) == ({"d/k": ["0.png", "1.png", "2.png"]}, {})
    with path.open("rb") as file:
        index = build_index(path, load_tokenizer())
        assert [read_member(file.fileno(), member) for _, member in index.images(0)] == [RED] * 3


def test_links_to_files_without_a_suffix(tmp_path: Path) -> None:
    files: list[File] = [
        special("s/k.png", tarfile.SYMTYPE, "../blobs/ab12"),
        ("s/k.txt", b"x"),
        ("blobs/ab12", RED),
    ]
    usable, skipped = index_of(tmp_path / "s.tar", tar_bytes(*files))
    assert usable == {"s/k": ["png"]}
    assert skipped == {"blobs/ab12": "a file without a suffix belongs to no sample"}


@pytest.mark.parametrize("names", ["k.JPG k.txt", "k.Jpeg k.TXT", "k.png k.JSON", "./k.png /k.txt", "a//k.png a/k.txt",
                                   "a/../k.png k.txt", "k.jfif k.txt"])  # fmt: skip
def test_suffixes_in_other_case_and_other_ways_to_write_a_path(tmp_path: Path, names: str) -> None:
    data = {"txt": b"x", "json": VQA}
    files: list[File] = [(name, data.get(name.lower().rpartition(".")[2], RED)) for name in names.split()]
    usable, skipped = index_of(tmp_path / "s.tar", tar_bytes(*files))
    assert len(usable) == 1 and skipped == {}


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("key", ["d" * 90 + "/" + "x" * 80, "d/" + "图" * 60, "é", "x" * 99])
def test_long_and_foreign_names(tmp_path: Path, format_: int, key: str) -> None:
    files = caption(key)
    if format_ == tarfile.USTAR_FORMAT and len(f"{key}.png".encode()) > 100 and "d/x" not in key:
        pytest.skip("does not fit into this format")
    assert index_of(tmp_path / "s.tar", tar_bytes(*files, format_=format_)) == ({key: ["png"]}, {})


@pytest.mark.parametrize(
    "command", ["--format=gnu", "--format=posix", "--format=v7", "--format=gnu -b 128", "--format=ustar -b 1"]
)
def test_tars_of_gnu_tar(tmp_path: Path, command: str) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    long = "x" * (60 if "v7" in command or "ustar" in command else 120)
    for key in ("a", "sub/b", "sub/图", long):
        for name, data in caption(key):
            (folder / str(name)).write_bytes(data)
    (folder / "a.1.png").hardlink_to(folder / "a.png")
    subprocess.run(["tar", *command.split(), "-cf", tmp_path / "s.tar", "-C", folder, "."], check=True)
    usable, skipped = index_of(tmp_path / "s.tar", (tmp_path / "s.tar").read_bytes())
    assert usable == {"a": ["png", "1.png"], "sub/b": ["png"], "sub/图": ["png"], long: ["png"]}
    assert skipped == {}


def test_joined_tars_are_read_to_the_last(tmp_path: Path) -> None:
    parts = [tar_bytes(*(file for i in range(4) for file in caption(f"{part}{i}"))) for part in "abc"]
    usable, skipped = index_of(tmp_path / "s.tar", b"".join(parts))
    assert (len(usable), skipped) == (12, {})


def test_joints_are_noted_as_a_zeroed_part_may_look_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tar_bytes(*(file for i in range(30) for file in caption(f"{i:02d}")))
    for name, content in {
        "0": whole,
        "1": whole + tar_bytes(*caption("z")),
        "2": whole[:18432] + bytes(2048) + whole[20480:],
    }.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    notes = [
        build_index(tmp_path / f"{n}.tar", load_tokenizer()).arrays["noted_keys"].tolist() for n in range(3)
    ]
    assert notes == [[], [f"byte {len(whole)}".encode()], [b"byte 20480"]]
    for path in ("1.tar", "0.tar"):
        (tmp_path / path).unlink()
    monkeypatch.setattr(sys, "argv", ["index_shards.py", str(tmp_path), "--workers", "1"])
    assert index_shards.main() == 0
    told = capsys.readouterr().out
    assert f"1 places noted: {JOINT} (for example 2.tar:byte 20480)" in told


def test_sizes_in_binary_and_in_a_pax_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(tar_bytes(*caption("k")))
    set_field(data, 0, 124, b"\x80" + len(RED).to_bytes(11, "big"))
    assert index_of(tmp_path / "s.tar", bytes(data)) == ({"k": ["png"]}, {})
    info = tarfile.TarInfo("k.png")
    info.pax_headers = {"size": str(len(RED)), "comment": "x=y\nz"}
    pax = tar_bytes((info, RED), ("k.txt", b"x"), format_=tarfile.PAX_FORMAT)
    assert index_of(tmp_path / "s.tar", pax) == ({"k": ["png"]}, {})


# ---- samples that are not: named, and the others are there


def set_field(data: bytearray, header: int, at: int, value: bytes) -> None:
    """Change a header and make its checksum right."""
    data[header + at : header + at + len(value)] = value
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + BLOCK])


BAD_SAMPLES: dict[str, tuple[list[File], dict[str, str]]] = {
    "link out of the tar": (
        [("k.0.png", RED), special("k.1.png", tarfile.LNKTYPE, "gone.png"), ("k.json", VQA)],
        {"k": ".1.png is a link to 'gone.png', which is no file of the shard"},
    ),
    "absolute link": ([special("k.png", tarfile.SYMTYPE, "/etc/passwd"), ("k.txt", b"x")], {"k": ".png is a link"}),
    "link to a name that occurs twice": (
        [special("k.png", tarfile.SYMTYPE, "l.png"), ("k.txt", b"x"), ("l.png", RED), ("l.png", BLUE)],
        {"k": ".png is a link to 'l.png'", "l": "two files named .png"},
    ),
    "circle of links": (
        [special("k.png", tarfile.SYMTYPE, "l.png"), special("l.png", tarfile.SYMTYPE, "k.png"), ("k.txt", b"x")],
        {"k": ".png is a link to 'l.png'", "l": ".png is a link to 'k.png'"},
    ),
    "pipe": ([("k.0.png", RED), special("k.1.png", tarfile.FIFOTYPE), ("k.json", VQA)], {"k": ".1.png is a pipe"}),
    "unknown image": ([("k.0.png", RED), ("k.1.heic", b"x"), ("k.json", VQA)], {"k": "unknown kind of image: .1.heic"}),
    "image of unknown suffix": ([("k.0.png", RED), ("k.1.pic", BLUE), ("k.json", VQA)], {"k": "unknown kind of image"}),
    "compressed image": ([("k.0.png", RED), ("k.1.jpg.gz", b"x"), ("k.json", VQA)], {"k": "a compressed image or"}),
    "compressed film": ([("k.png", RED), ("k.mp4.zst.gz", b"x"), ("k.txt", b"x")], {"k": "a compressed image or text"}),
    "compressed record": ([*caption("k"), ("k.json.xz", b"x")], {"k": "a compressed image or text: .json.xz"}),
    "an image named as a text": ([*caption("k"), ("k.1.txt", BLUE)], {"k": "unknown kind of image: .1.txt"}),
    "a record with a key twice": (
        [("k.png", RED), ("k.json", b'{"task": "caption", "caption": "one", "caption": "two"}')],
        {"k": "malformed json: the key 'caption' occurs twice"},
    ),
    "no such task": (
        [("k.png", RED), ("k.json", b'{"task": "ask"}'), ("l.png", RED), ("l.json", b'{"task": null}')],
        {"k": "malformed record: expected a task of caption, vqa", "l": "malformed record: expected a task of caption"},
    ),
    "no text": ([("k.png", RED)], {"k": "neither .json nor .txt, only png"}),
    "no image": ([("k.txt", b"x")], {"k": "caption: expected 1 or more images, found 0"}),
    "same number": ([("k.0.png", RED), ("k.00.jpg", RED), ("k.json", VQA)], {"k": "which image comes first"}),
    "twice": ([*caption("k"), ("k.png", BLUE)], {"k": "two files named .png"}),
    "twice in other case": ([*caption("k"), ("k.PNG", BLUE)], {"k": "file names differ in case only: png, txt, PNG"}),
    "broken json beside a caption": ([*caption("k"), ("k.json", b"{")], {"k": "malformed json"}),
    "deep json beside a caption": ([*caption("k"), ("k.json", b"[" * 100_000)], {"k": "malformed json"}),
    "NUL in the text": ([("k.png", RED), ("k.txt", b"x\0\0")], {"k": "malformed txt: it holds NUL bytes"}),
    "infinite number": (
        [("k.png", RED), ("k.json", b'{"task": "region_caption", "box": [1e400, 0, 1, 1], "caption": "x"}')],
        {"k": "malformed"},
    ),
    "empty files": ([("k.png", b""), ("k.txt", b"x"), ("l.png", RED), ("l.txt", b"")], {"k": "png:", "l": "mal"}),
    "macOS": (
        [*caption("k"), ("._k.png", b"x"), ("__MACOSX/k.txt", b"x"), (".DS_Store", b"x"), ("Thumbs.db", b"x")],
        {"._k.png": "a companion file of macOS", "__MACOSX/k.txt": "a companion file of macOS",
         ".DS_Store": "a hidden file", "Thumbs.db": "a hidden file"},
    ),
    "long name": ([("x" * 3000 + ".png", RED)], {"x" * 1000: "a file name of more than 1000 characters"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_sample_that_is_not_whole_is_named(tmp_path: Path, name: str) -> None:
    files, expected = BAD_SAMPLES[name]
    format_ = tarfile.GNU_FORMAT if name == "long name" else tarfile.USTAR_FORMAT
    content = tar_bytes(*caption("before"), *files, *caption("after"), format_=format_)
    usable, skipped = index_of(tmp_path / "s.tar", content)
    assert set(usable) == {"before", "after"} | ({"k"} if name == "macOS" else set())
    assert skipped.keys() == expected.keys()
    for key, reason in expected.items():
        assert skipped[key].startswith(reason)


@pytest.mark.parametrize(
    "options", ["--format=gnu", "--format=posix --sparse-version=1.0", "--format=posix --sparse-version=0.0"]
)
def test_sparse_files_are_named(tmp_path: Path, options: str) -> None:
    with (tmp_path / "k.bmp").open("wb") as file:
        for part in range(40):  # more holes than fit into one header
            file.seek(part * 65536)
            file.write(b"x" * 4096)
    for name, data in [("k.txt", b"x"), *caption("z")]:
        (tmp_path / str(name)).write_bytes(data)
    subprocess.run(
        ["tar", "-S", *options.split(), "-cf", "s.tar", "k.bmp", "k.txt", "z.png", "z.txt"],
        check=True,
        cwd=tmp_path,
    )
    usable, skipped = index_of(tmp_path / "s.tar", (tmp_path / "s.tar").read_bytes())
    assert (usable, skipped) == ({"z": ["png"]}, {"k": ".bmp is stored sparse"})


def test_a_file_stored_under_two_names_is_refused(tmp_path: Path, byte_level: Tokenizer) -> None:
    content = tar_bytes(*caption("ü1"), *caption("ü2"), *caption("z"), format_=tarfile.PAX_FORMAT)
    content = content.replace("path=ü1.txt".encode(), "path=ü2.txt".encode())
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match="is stored under two names, '.1.txt' and 'ü2.txt'"):
        build_index(tmp_path / "s.tar", byte_level)


def test_a_file_with_two_sizes_is_named(tmp_path: Path) -> None:
    info = tarfile.TarInfo("k.txt")
    info.pax_headers = {"size": "14"}
    usable, skipped = index_of(
        tmp_path / "s.tar", tar_bytes(("k.png", RED), (info, b"a red square"), *caption("z"))
    )
    content = tar_bytes(("k.png", RED), (info, b"a red square"), *caption("z"), format_=tarfile.PAX_FORMAT)
    usable, skipped = index_of(tmp_path / "s.tar", content)
    assert (set(usable), skipped) == ({"z"}, {"k": ".txt is stored with two sizes, 12 and 14"})


@pytest.mark.parametrize("size", ["-1", "1e3", "0x10", " 5", "9" * 21, "1_0"])
def test_a_pax_size_that_is_no_number_is_refused(tmp_path: Path, byte_level: Tokenizer, size: str) -> None:
    info = tarfile.TarInfo("k.txt")
    info.pax_headers = {"size": size}
    content = tar_bytes((info, b"a red square"), *caption("z"), format_=tarfile.PAX_FORMAT)
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match="size .* in the header at byte"):
        build_index(tmp_path / "s.tar", byte_level)


def test_a_size_that_is_too_small_shows_in_what_follows(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(("k.txt", b"a red square"), ("k.png", RED), *caption("z")))
    set_field(data, 0, 124, b"%011o\0" % 5)
    usable, skipped = index_of(tmp_path / "s.tar", bytes(data))
    assert set(usable) == {"z"}
    assert skipped["k"] == ".txt is followed by bytes that are not zero: its size may be wrong"


# ---- shards that are refused by name


def zeroed(begin: int, end: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:begin] + bytes(end - begin) + data[end:]


def resized(header: int, size: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        set_field(changed, header, 124, size)
        return bytes(changed)

    return change


def header_of(data: bytes, name: bytes) -> int:
    return data.index(name) // BLOCK * BLOCK


WHOLE = tar_bytes(*(file for i in range(40) for file in caption(f"{i:03d}")))
LAST = header_of(WHOLE, b"039.png")
BAD_SHARDS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty file": (lambda data: b"", "the file is empty"),
    "no tar": (lambda data: b"<html></html>" * 100, "no tar header at byte 0"),
    "short": (lambda data: b"x", "no end mark at byte 0"),
    "cut in a file": (lambda data: data[: LAST + 520], "expected .* the file ends at byte"),
    "cut between files": (lambda data: data[:LAST], "no end mark at byte"),
    "cut in a header": (lambda data: data[: LAST + 100], "no end mark at byte"),
    "zeroed header": (zeroed(1024 * 20, 1024 * 20 + 512), "are no end mark, data follow at byte"),
    "zeroed file": (zeroed(1024 * 20, 1024 * 21), "are no end mark, data follow at byte"),
    "zeroed page": (zeroed(1024 * 20, 1024 * 24), "are no end mark, data follow at byte"),
    "zeroed end": (zeroed(1024 * 20, len(WHOLE)), "the zeros from byte .* are no end mark"),
    "altered header": (lambda data: data[:100] + b"x" + data[101:], "no tar header at byte 0"),
    "negative size": (resized(0, b"\xff" * 12), "size .* in the header at byte 0"),
    "size of letters": (resized(0, b"abc"), "size .* in the header at byte 0"),
    "huge size": (resized(0, b"\x80" + b"\xff" * 11), "the file ends at byte"),
    "large size": (resized(0, b"77777777777\0"), "the file ends at byte"),
    "size over the next sample": (resized(0, b"%011o\0" % (512 + 1024 * 2)), "reach over other files"),
    "no tar behind the end": (lambda data: data + b"x" * 700, "no tar header at byte"),
    "malformed pax": (lambda data: tar_bytes(*caption("é"), format_=tarfile.PAX_FORMAT).replace(b"15 path", b"99 path"),
                      "malformed PAX header"),
    "gzip": (gzip.compress, "expected a plain tar, found gzip, which is to be decompressed"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_a_damaged_shard_is_refused(tmp_path: Path, name: str, byte_level: Tokenizer) -> None:
    change, reason = BAD_SHARDS[name]
    path = tmp_path / "s.tar"
    path.write_bytes(change(WHOLE))
    with pytest.raises(DataError, match=rf"s\.tar: .*{reason}"):
        build_index(path, byte_level)


def test_a_shard_that_is_written_meanwhile_is_refused(
    tmp_path: Path, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(WHOLE)

    def scan_and_touch(file: io.BufferedReader, of: Path, joints: list[int]) -> object:
        yield from scan_shard(file, of, joints)
        os.utime(path, ns=(0, 0))

    monkeypatch.setattr("megatron_qwenvl.data.shards.index_builder.scan_shard", scan_and_touch)
    with pytest.raises(DataError, match=r"s\.tar: changed while it was indexed"):
        build_index(path, byte_level)


@pytest.mark.parametrize("blocks", [1, 2, 16, 20])
def test_ends_that_are_proper(tmp_path: Path, blocks: int) -> None:
    """One or two blocks, or what fills a record of a usual size."""
    end = LAST + 4 * BLOCK
    size = end + blocks * BLOCK if blocks < 3 else -(-(end + 2 * BLOCK) // (blocks * BLOCK)) * blocks * BLOCK
    assert len(index_of(tmp_path / "s.tar", WHOLE[:end] + bytes(size - end))[0]) == 40


def test_files_that_are_not_shown_do_not_matter(tmp_path: Path) -> None:
    files = [*caption("k"), ("k.cls", b"7"), ("k.npy", b"x" * 600), ("k.tar", tar_bytes(*caption("inner")))]
    files += [("k.class", b"BMW 3"), ("k.xml", b"<?xml version='1.0'?><annotation><size/></annotation>")]
    files += [
        ("k.npy.gz", b"\x1f\x8b"),
        ("k.bin", bytes(range(99))),
        ("k.meta.json", b"{}"),
        ("k.h5", b"\x89HDF"),
    ]
    files += [
        ("k.url", b"https://example.org/a.jpg"),
        ("k.md5", b"a" * 32),
        ("k.json", b'{"task": null, "url": ""}'),
    ]
    assert index_of(tmp_path / "s.tar", tar_bytes(*files)) == ({"k": ["png"]}, {})


def test_names_are_those_that_extracting_gives() -> None:
    assert [normalise_name(name) for name in ("./a/b", "/a/b", "a//b", "a/./b", "a/../b", "..b", "a.b/c")] == [
        "a/b", "a/b", "a/b", "a/b", "b", "..b", "a.b/c",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"x" * 120 + b".png", bytes(124), "no name in the header"),
        (b"x" * 120 + b".png", b"x" * 20 + bytes(2) + b"x" * 98 + b".png", "no name in the header"),
    ],
)
def test_a_long_name_that_is_damaged_is_refused(
    tmp_path: Path, byte_level: Tokenizer, old: bytes, new: bytes, reason: str
) -> None:
    content = tar_bytes(*caption("x" * 120), *caption("z"), format_=tarfile.GNU_FORMAT)
    (tmp_path / "s.tar").write_bytes(content.replace(old, new, 1))
    with pytest.raises(DataError, match=rf"s\.tar: .*{reason}"):
        build_index(tmp_path / "s.tar", byte_level)


def test_the_target_of_a_link_before_a_file_is_refused(tmp_path: Path, byte_level: Tokenizer) -> None:
    info = tarfile.TarInfo("k.png")
    info.pax_headers = {"linkpath": "l.png"}
    (tmp_path / "s.tar").write_bytes(tar_bytes((info, RED), ("k.txt", b"x"), format_=tarfile.PAX_FORMAT))
    with pytest.raises(DataError, match="has the target of a link and is none"):
        build_index(tmp_path / "s.tar", byte_level)


def test_a_compressed_copy_beside_its_shard_does_not_matter(tmp_path: Path) -> None:
    for name in (
        "a.tar",
        "a.tar.gz",
        "b.TGZ",
        "c.Tar",
        "d.tar.zst",
        "._a.tar",
        "._e.tar.gz",
        "a.tar.md5",
        "f.zip",
    ):
        (tmp_path / name).write_bytes(b"")
    assert sorted(unread_shards(tmp_path)) == ["b.TGZ", "c.Tar", "d.tar.zst"]
    assert list_shards(tmp_path) == [tmp_path / "a.tar"]


@pytest.mark.parametrize(
    ("name", "command"),
    [("x.tar.lz4", "lz4 -d"), ("x.tar.Z", "gzip -d"), ("x.taz", "gzip -d"), ("x.tar.lzma", "xz -d"),
     ("x.tar.br", "brotli -d"), ("x.tar.lz", "lzip -d"), ("x.tar.lzo", "lzop -d"), ("x.tar.zip", "unzip"),
     ("x.tbz2", "bzip2 -d"), ("x.tar.7z", "7z x")],
)  # fmt: skip
def test_compressed_tars_of_every_kind_are_named(tmp_path: Path, name: str, command: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}: compressed tars are not read; decompress it \({command}"):
        list_shards(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    assert list(unread_shards(tmp_path)) == [name]
