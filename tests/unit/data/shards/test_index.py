"""Shards, their indices and manifests, and what is said when they do not fit together."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_qwenvl.commands import index_shards
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.records.tasks import TASKS, decode_record, parse_record
from megatron_qwenvl.data.rendering.renderer import Renderer
from megatron_qwenvl.data.rendering.token_builder import ImageInfo
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer, load_tokenizer
from megatron_qwenvl.data.sampling.sampler import open_training_sampler
from megatron_qwenvl.data.shards import index_builder, indexing
from megatron_qwenvl.data.shards.directory import open_directory
from megatron_qwenvl.data.shards.index import index_path, load_index
from megatron_qwenvl.data.shards.index_builder import build_index
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory
from megatron_qwenvl.data.shards.samples import read_member, split_name
from megatron_qwenvl.data.shards.skipped import printable, reason_kind, tally
from megatron_qwenvl.runtime import retry
from tests.unit.data.conftest import QWEN_VOCABULARY
from tests.unit.data.data_cases import mixed_samples, png_image, run_config, sample, write_shard, write_source
from tests.unit.data.test_images import absurd_png

VQA = {"task": "vqa", "question": "q?", "answer": "a"}


def test_index_describes_every_sample(tmp_path: Path, byte_level: Tokenizer) -> None:
    samples = mixed_samples(27)
    path = write_shard(tmp_path / "s.tar", samples)
    index = build_index(path, byte_level)
    assert [index.key(row) for row in range(len(index))] == [item["__key__"] for item in samples]
    for row, item in enumerate(samples):
        record = parse_record(json.loads(item["json"]))
        infos = [ImageInfo("png", 20, 10)] if "png" in item else []
        assert index.arrays["tasks"][row] == TASKS.index(record.task)
        assert [info for info, _ in index.images(row)] == infos
        for slots in (0, 16, 256):
            length = len(Renderer(byte_level, slots).render(record, infos).tokens)
            assert index.arrays["text_tokens"][row] + slots * index.image_counts[row] == length


def test_offsets_lead_to_the_members(tmp_path: Path, byte_level: Tokenizer) -> None:
    samples = mixed_samples(9)
    path = write_shard(tmp_path / "s.tar", samples)
    index = build_index(path, byte_level)
    descriptor = os.open(path, os.O_RDONLY)
    for row, item in enumerate(samples):
        assert read_member(descriptor, index.text_member(row)[1]) == item["json"]
        for _, member in index.images(row):
            assert read_member(descriptor, member) == item["png"]
    os.close(descriptor)


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_found(tmp_path: Path, byte_level: Tokenizer, format_: int) -> None:
    key = "d/" + "x" * 90 if format_ == tarfile.USTAR_FORMAT else "d/" + "图" * 60
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=format_) as tar:
        for name, data in ((f"{key}.0.png", png_image()), (f"{key}.json", json.dumps(VQA).encode())):
            (tmp_path / "f").write_bytes(data)
            tar.add(tmp_path / "f", name)
    index = build_index(path, byte_level)
    descriptor = os.open(path, os.O_RDONLY)
    assert index.key(0) == key
    assert json.loads(read_member(descriptor, index.text_member(0)[1])) == VQA
    os.close(descriptor)


def test_a_name_that_is_not_utf8_skips_the_sample(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = write_shard(
        tmp_path / "s.tar", [sample("good", VQA, png=png_image()), sample("evil", VQA, png=png_image())]
    )
    path.write_bytes(path.read_bytes().replace(b"evil.", b"e\xff\xffl."))
    data = bytearray(path.read_bytes())
    for at in (data.find(b"e\xff\xffl.json"), data.find(b"e\xff\xffl.png")):
        header = bytes(data[at : at + 148]) + b" " * 8 + bytes(data[at + 156 : at + 512])
        data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(data)
    index = build_index(path, byte_level)
    assert [index.key(row) for row in range(len(index))] == ["good"]
    assert index.arrays["skipped_reasons"].tolist() == [b"a file name is not UTF-8"]


def test_names_split_like_webdataset() -> None:
    assert split_name("a.b/c.0.jpg") == ("a.b/c", "0.jpg")
    assert split_name("c") == ("c", "")


def test_saved_index_is_the_built_one_and_holds_no_pickles(tmp_path: Path, byte_level: Tokenizer) -> None:
    write_source(tmp_path / "s", [*mixed_samples(9), sample("bad", b"{")])
    path = tmp_path / "s" / "000000.tar"
    stored, built = load_index(path), build_index(path, byte_level)
    assert stored.arrays.keys() == built.arrays.keys()
    for name, values in built.arrays.items():
        np.testing.assert_array_equal(stored.arrays[name], values)
    assert (stored.digest, stored.size, stored.tokenizer) == (
        built.digest,
        path.stat().st_size,
        byte_level.fingerprint,
    )
    with np.load(index_path(path), allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)


def test_images_are_indexed_in_the_order_of_the_text(tmp_path: Path, byte_level: Tokenizer) -> None:
    turns = [
        {"from": "user", "value": "<img>10.png</img><img>2.png</img>?"},
        {"from": "assistant", "value": "y"},
    ]
    images = {"_10_png": png_image(10, 10), "_2_png": png_image(2, 2)}
    chat = sample("chat", {"task": "chat", "conversations": turns}, **images)
    vqa = sample("vqa", VQA, **images)
    index = build_index(write_shard(tmp_path / "s.tar", [chat, vqa]), byte_level)
    assert [info.name for info, _ in index.images(0)] == ["10.png", "2.png"]
    assert [info.name for info, _ in index.images(1)] == ["2.png", "10.png"]
    assert index.largest_images.tolist() == [100, 100]


def test_unusable_samples_are_left_out_by_name(tmp_path: Path, byte_level: Tokenizer) -> None:
    samples = [
        sample("json", b'{"task": '),
        sample("record", {"task": "vqa"}, png=png_image()),
        sample("none", VQA),
        sample("image", VQA, png=b"no image"),
        sample("absurd", VQA, png=absurd_png(100_000, 100_000)),
        sample("good", VQA, png=png_image()),
        {"__key__": "lonely", "png": png_image()},
    ]
    index = build_index(write_shard(tmp_path / "s.tar", samples), byte_level)
    assert [index.key(row) for row in range(len(index))] == ["good"]
    skipped = dict(zip(index.arrays["skipped_keys"], index.arrays["skipped_reasons"], strict=True))
    assert sorted(skipped) == [b"absurd", b"image", b"json", b"lonely", b"none", b"record"]
    assert skipped[b"json"].startswith(b"malformed json")
    assert b"question: Field required" in skipped[b"record"]
    assert b"expected 1 or more images, found 0" in skipped[b"none"]
    assert b"png: not a readable image" in skipped[b"image"]
    assert b"exceeds limit" in skipped[b"absurd"]
    assert skipped[b"lonely"] == b"neither .json nor .txt, only png"


def test_verifying_images_finds_truncated_ones(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = write_shard(tmp_path / "s.tar", [sample("half", VQA, png=png_image(50, 50)[:-40])])
    assert len(build_index(path, byte_level)) == 1
    verified = build_index(path, byte_level, verify_images=True)
    assert len(verified) == 0
    assert b"cannot decode" in verified.arrays["skipped_reasons"][0]


def test_img2dataset_shards_are_captions(tmp_path: Path, byte_level: Tokenizer) -> None:
    meta = {
        "caption": "a red square",
        "url": "http://x",
        "key": "000000000",
        "status": "success",
        "width": 20,
    }
    samples = [
        {
            "__key__": "000000000",
            "jpg": png_image(),
            "txt": b"a red square",
            "json": json.dumps(meta).encode(),
        },
        {"__key__": "000000001", "jpg": png_image(), "txt": b"a blue square"},
        {"__key__": "000000002", "jpg": png_image(), "txt": b"  "},
    ]
    index = build_index(write_shard(tmp_path / "s.tar", samples), byte_level)
    assert index.arrays["tasks"].tolist() == [TASKS.index("caption")] * 2
    assert index.text_member(0)[0] == "000000000.txt"
    assert index.arrays["text_tokens"][0] == len(b"Generate the caption in English: a red square") + 3
    assert index.arrays["skipped_keys"].tolist() == [b"000000002"]


# ---- directories


def test_opening_reads_the_manifest_only(tmp_path: Path, byte_level: Tokenizer) -> None:
    root = write_source(tmp_path / "s", mixed_samples(25))
    for index in root.glob("*.npz"):
        index.unlink()
    directory = open_directory(root, byte_level.fingerprint)
    assert directory.counts.tolist() == [10, 10, 5]
    with pytest.raises(DataError, match=r"000001\.index\.npz: no index"):
        directory.load_index(1)


def test_current_shards_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_source(tmp_path / "s", mixed_samples(25))
    built: list[str] = []
    real = indexing.build_index

    def counting(path: Path, *arguments: object) -> object:
        built.append(path.name)
        return real(path, *arguments)

    monkeypatch.setattr(indexing, "build_index", counting)
    index_directory(root, IndexJob())
    assert built == []
    write_shard(root / "000001.tar", mixed_samples(8, seed=9))
    index_directory(root, IndexJob())
    assert built == ["000001.tar"]
    index_directory(root, IndexJob(verify_images=True))
    index_directory(root, IndexJob())
    assert len(built) == 4
    index_directory(root, IndexJob(tokenizer=QWEN_VOCABULARY))
    index_directory(root, IndexJob(tokenizer=QWEN_VOCABULARY, force=True))
    assert len(built) == 10


@pytest.mark.parametrize("cut", ["inside a file", "between two files", "inside a header"])
def test_truncated_shard_is_named_and_the_others_are_indexed(
    tmp_path: Path, byte_level: Tokenizer, cut: str
) -> None:
    root = write_source(tmp_path / "s", mixed_samples(20))
    path = root / "000000.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    ends = {
        "inside a file": last.offset_data + last.size // 2,
        "between two files": last.offset,
        "inside a header": last.offset + 100,
    }
    os.truncate(path, ends[cut])
    results = index_directory(root, IndexJob())
    assert [bool(result.error) for result in results] == [True, False]
    assert "000000.tar: damaged or truncated tar" in results[0].error
    with pytest.raises(
        DataError,
        match=r"000000\.tar: damaged or truncated tar: .*; replace the shard or move it away",
    ):
        open_directory(root, byte_level.fingerprint)
    path.unlink()
    assert open_directory(root, byte_level.fingerprint).counts.tolist() == [10]


def test_not_a_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"something else" * 100)
    (tmp_path / "y.tar").write_bytes(b"")
    results = index_directory(tmp_path, IndexJob())
    assert all("damaged or truncated tar" in result.error for result in results)


def _remove_shard(root: Path) -> None:
    (root / "000001.tar").unlink()


def _add_shard(root: Path) -> None:
    write_shard(root / "000009.tar", mixed_samples(3))


def _grow_shard(root: Path) -> None:
    with (root / "000001.tar").open("ab") as file:
        file.write(bytes(512))


def _remove_manifest(root: Path) -> None:
    (root / "manifest.json").unlink()


def _break_manifest(root: Path) -> None:
    path = root / "manifest.json"
    path.write_text(path.read_text().replace('"samples"', '"simples"'))


def _age_manifest(root: Path) -> None:
    path = root / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))


def _empty(root: Path) -> None:
    for path in root.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_remove_shard, r"000001\.tar: shard of the manifest cannot be read: No such file"),
        (_add_shard, r"000009\.tar: shard is not in manifest"),
        (_grow_shard, r"000001\.tar: expected \d+ bytes as indexed, found \d+"),
        (_remove_manifest, r"manifest\.json: no manifest; run python tools/index_shards\.py"),
        (_break_manifest, r"manifest\.json: damaged manifest"),
        (_age_manifest, r"manifest\.json: expected index format 2, found 0"),
        (_empty, r"s: no shards"),
    ],
)
def test_opening_names_what_does_not_fit(
    tmp_path: Path, byte_level: Tokenizer, damage: object, reason: str
) -> None:
    root = write_source(tmp_path / "s", mixed_samples(25))
    damage(root)  # type: ignore[operator]
    with pytest.raises(DataError, match=reason):
        open_directory(root, byte_level.fingerprint)


def test_wrong_tokenizer_is_named(tmp_path: Path, qwen: Tokenizer) -> None:
    root = write_source(tmp_path / "s", mixed_samples(5))
    with pytest.raises(DataError, match=r"manifest\.json: indexed with another tokenizer"):
        open_directory(root, qwen.fingerprint)


def test_no_usable_sample_is_said(tmp_path: Path, byte_level: Tokenizer) -> None:
    root = write_source(tmp_path / "s", [sample("bad", b"{")])
    with pytest.raises(
        DataError, match=r"no usable sample in 1 shards: 1 left out: malformed json: .*000000.tar:bad"
    ):
        open_directory(root, byte_level.fingerprint)


def test_a_changed_shard_of_the_same_size_shows_in_its_digest(tmp_path: Path, byte_level: Tokenizer) -> None:
    root = write_source(tmp_path / "s", mixed_samples(5))
    path = root / "000000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    open_directory(root, byte_level.fingerprint)
    with pytest.raises(DataError, match=r"000000\.tar: expected digest"):
        open_directory(root, byte_level.fingerprint, verify_digests=True)


def test_an_index_of_another_shard_is_refused(tmp_path: Path, byte_level: Tokenizer) -> None:
    root = write_source(tmp_path / "s", mixed_samples(20))
    os.replace(root / "000001.index.npz", root / "000000.index.npz")
    with pytest.raises(DataError, match=r"000000\.tar: index and manifest differ"):
        open_directory(root, byte_level.fingerprint).load_index(0)


def test_a_damaged_index_is_named(tmp_path: Path, byte_level: Tokenizer) -> None:
    root = write_source(tmp_path / "s", mixed_samples(20))
    path = root / "000001.index.npz"
    directory = open_directory(root, byte_level.fingerprint)
    whole = path.read_bytes()
    deflated = bytearray(whole)
    deflated[whole.index(b"meta.npy") + 60] ^= 0xFF  # in the compressed bytes of the first array
    pickled = io.BytesIO()
    np.savez(pickled, meta=np.array([{"format": 2}], dtype=object))
    for damaged in (whole[:-100], b"", b"text", b"<html>", bytes(deflated), pickled.getvalue()):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"000001\.index\.npz: damaged index") as caught:
            directory.load_index(1)
        assert "unsafely" not in str(caught.value) and "pickle.load" not in str(caught.value)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="damaged index: not a zip archive; run python tools/index_shards.py"):
        directory.load_index(1)


UNFORESEEN = [
    OverflowError,
    AssertionError,
    OSError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    MemoryError,
]


@pytest.mark.parametrize("kind", UNFORESEEN)
def test_an_error_that_nobody_foresaw_leaves_one_sample_out(
    tmp_path: Path, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fail(suffix: str, data: bytes) -> object:
        if b"evil" in data:
            raise kind("too much")
        return decode_record(suffix, data)

    monkeypatch.setattr(index_builder, "decode_record", fail)
    texts = [sample(key, {"task": "text", "text": key}) for key in ("good", "evil", "last")]
    index = build_index(write_shard(tmp_path / "s.tar", texts), byte_level)
    assert [index.key(row) for row in range(len(index))] == ["good", "last"]
    assert index.arrays["skipped_reasons"].tolist() == [f"cannot be used: {kind.__name__}: too much".encode()]


def test_a_disk_that_cannot_be_read_is_not_taken_for_a_bad_sample(
    tmp_path: Path, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, member: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    path = write_shard(tmp_path / "s.tar", [sample("a", {"task": "text", "text": "x"})])
    monkeypatch.setattr(index_builder, "read_member", fail)
    with pytest.raises(DataError, match=r"s\.tar: cannot read the shard: Input/output error"):
        build_index(path, byte_level)


@pytest.mark.parametrize("kind", ["pipe", "directory", "dangling link", "vanished"])
def test_what_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    root = write_source(tmp_path / "s", mixed_samples(9))
    path = root / "x.tar"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    else:
        monkeypatch.setattr(indexing, "list_shards", lambda directory: [root / "000000.tar", path])
    results = index_directory(root, IndexJob())
    assert "x.tar: cannot read the shard: " in results[1].error and not results[0].error


def test_left_out_samples_are_counted_by_kind_of_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = [{"task": "referring", "phrase": "x", "boxes": [[n, 1, n, 2]]} for n in (3, 4, 5)]
    bad = [sample(f"box{n}", record, png=png_image()) for n, record in enumerate(boxes)]
    root = write_source(tmp_path / "s", [*bad, sample("json", b"{"), *mixed_samples(2)], per_shard=2)
    kinds = open_directory(root, load_tokenizer().fingerprint).catalog.skipped
    assert [(kind.count, kind.example) for kind in kinds] == [(3, "000000.tar:box0"), (1, "000001.tar:json")]
    sampler = open_training_sampler(run_config(tmp_path, {"s": 1}), load_tokenizer().fingerprint)
    assert [line.split(":")[:2] for line in sampler.source_notes()][:1] == [["data s", " 3 left out"]]
    monkeypatch.setattr(sys, "argv", ["index_shards.py", str(root), "--workers", "1"])
    assert index_shards.main() == 0
    printed = capsys.readouterr().out
    assert (
        f"{root}: 3 left out: box (3.0, 1.0, 3.0, 2.0)" in printed
        and "for example 000000.tar:box0" in printed
    )
    monkeypatch.setattr(sys, "argv", ["index_shards.py", str(root), "--list_skipped"])
    assert index_shards.main() == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in listed] == [
        *(f"{root}/00000{n // 2}.tar:box{n}" for n in range(3)), f"{root}/000001.tar:json",
    ]  # fmt: skip


def test_listing_goes_on_over_shards_that_could_not_be_indexed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_source(tmp_path / "s", [*mixed_samples(3), sample("last", b"{")], per_shard=2)
    (root / "000000.tar").write_bytes(b"<html>" * 200)
    (root / "000002.tar.lz4").write_bytes(b"")
    (root / "000003.tar").write_bytes((root / "000001.tar").read_bytes())
    for options, code in (["--workers", "1"], 1), (["--list_skipped"], 0):
        monkeypatch.setattr(sys, "argv", ["index_shards.py", str(root), *options])
        assert index_shards.main() == code
    listed = capsys.readouterr().out.splitlines()[-4:]
    assert listed[0].startswith(f"{root}/000001.tar:last: malformed json")
    assert listed[1].startswith(f"{root}/000003.tar:last: malformed json")
    assert listed[2].startswith(f"whole shard: {root}/000000.tar: ") and "no tar header" in listed[2]
    assert listed[3].startswith(f"whole shard: {root}/000002.tar.lz4: compressed tars are not read")
    (root / "000003.index.npz").unlink()
    assert index_shards.main() == 1  # that index is wanted, and the command that is named makes it
    captured = capsys.readouterr()
    assert "000001.tar:last" in captured.out
    assert "000003.index.npz: no index; run python tools/index_shards.py" in captured.err


def test_names_of_the_data_cannot_forge_lines_of_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "x\n2026 error: all lost\x1b[2J"
    root = write_source(tmp_path / "s", [*mixed_samples(1), sample(key, b"{")])
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["index_shards.py", str(root), "--list_skipped"])
    assert index_shards.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{root}/000000.tar:x\\n2026 error: all lost\\x1b[2J: malformed json")
    (kind,) = open_directory(root, load_tokenizer().fingerprint).catalog.skipped
    assert str(kind).isprintable()
    assert printable("caf\u00e9 图 a\u202eb \ud800") == "caf\u00e9 图 a\\u202eb \\ud800"


def test_a_directory_whose_name_is_not_utf8_is_printed(tmp_path: Path) -> None:
    code = (
        "from megatron_qwenvl.runtime import console; console.escape_undecodable_names(); print('a\\udcffb')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.stdout, done.stderr) == ("a\\udcffb\n", "")


def test_many_kinds_of_reasons_become_a_hundred_and_one() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    reasons = [(first + second).encode() for first in letters for second in letters]
    kinds = tally("s.tar", [b"k"] * len(reasons), reasons)
    assert len(kinds) == 101 and sum(kind.count for kind in kinds) == len(reasons)
    assert kinds[0].kind == "other reasons"
    assert reason_kind("box (3.5, 1) of 'x y' at 0x7f1a") == reason_kind("box (4, 22.25) of 'z' at 0x1b")


@pytest.mark.parametrize("comes_back", [True, False])
def test_an_index_whose_folder_is_away_is_waited_for(
    comes_back: bool, tmp_path: Path, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while training, where an unmounted file system shows nothing."""
    write_source(tmp_path / "data", [sample("0", {"task": "text", "text": "a"})], per_shard=1)
    directory = open_directory(tmp_path / "data", byte_level.fingerprint)
    (tmp_path / "data").rename(tmp_path / "away")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if comes_back and len(slept) == 2:
            (tmp_path / "away").rename(tmp_path / "data")

    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: 20.0 * len(slept), sleep=sleep))
    if comes_back:
        assert len(directory.load_index(0).arrays["tasks"]) == 1 and len(slept) == 2
        assert "read after 2 repetitions" in retry.retry_read.take()[0]
    else:
        with pytest.raises(DataError, match="data: no such directory of shards"):
            directory.load_index(0)
        assert len(slept) > 10
