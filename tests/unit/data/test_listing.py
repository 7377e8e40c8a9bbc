"""Which files of a folder are images, what is passed over, and whether they are read again."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lora_vit.data import files
from lora_vit.data.files import Listing, digests_of, image_endings, locked_in
from lora_vit.errors import ConfigError
from lora_vit.files import locked


@pytest.fixture
def settled(monkeypatch):
    """Files are taken as written long ago."""
    monkeypatch.setattr(files, "_UNSETTLED", -(10**12))


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_what_is_passed_over_is_counted_and_three_are_named(tmp_path):
    listing = Listing(tmp_path)
    for i in range(1234):
        listing.skip("no images", f"{i}.txt")
    for i in range(3):
        listing.skip("hidden", f".{i}")
    listing.skip("broken links", os.fsdecode(b"\xe9"))
    assert listing.lines() == (
        "1,234 no images (0.txt, 1.txt, 2.txt, ...)", "3 hidden (.0, .1, .2)", "1 broken link (\\xe9)",
    )  # fmt: skip


def test_endings_are_those_that_pillow_reads():
    endings = image_endings()
    assert {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".tga", ".pcx"} <= endings
    assert not {".eps", ".wmf", ".mpg", ".hdf", ".grib", ".bufr"} & endings, "known by name only"
    assert not {".pdf", ".txt", ".npz"} & endings, "written or not known at all"
    assert endings <= set(Image.registered_extensions())


@pytest.mark.parametrize(
    ("folder", "content", "own"),
    [
        ("a", "0.png", False),
        *(("a", name, True) for name in ("record.json", "sweep.json", ".lock", "checkpoint.pt")),
        ("outputs", "mine.txt", False),
        ("outputs", "runs/x", True),
        ("outputs", "sweeps/x", True),
        ("other", "runs/x", False),
        ("cache", "x", True),
        ("summary", "../record.json", True),
        ("tensorboard", "../sweep.json", True),
        ("summary", "x", False),
    ],
)
def test_folders_that_training_wrote_are_known_by_what_is_in_them(folder, content, own, tmp_path):
    top = tmp_path / "top"
    fill(top / folder, "y", content)
    (tmp_path / "link").symlink_to(top / "cache")
    listing = Listing(tmp_path / "link")
    assert (folder in listing.folders(top)) is not own
    assert (folder in listing.passed.get("of lora_vit's own", [])) is own


def test_images_of_a_class_in_order_with_what_lies_below(tmp_path):
    """A file server's thumbnails of the same images would be in train and val."""
    root = fill(
        tmp_path / "top", "cat/b.png", "cat/a.JPG", "cat/deep/er/c.gif", "cat/.x.png", "cat/deep/own/record.json",
        "cat/notes.txt", "dog/d.png", "cat/@eaDir/0.png/SYNOPHOTO_THUMB_XL.jpg",
    )  # fmt: skip
    (root / "cat" / "deep" / "back").symlink_to(root / "cat")
    (root / "cat" / "deep" / "up").symlink_to(tmp_path)  # with the dogs, and what lies beside the data
    (root / "cat" / "also").symlink_to(root / "dog")
    (root / "cat" / "twice").symlink_to(root / "dog")
    (root / "cat" / "gone").symlink_to(tmp_path / "nowhere")
    listing = Listing(tmp_path / "cache")
    assert listing.images(root, "cat") == [
        "cat/a.JPG", "cat/also/d.png", "cat/b.png", "cat/deep/er/c.gif", "cat/twice/d.png",
    ]  # fmt: skip
    assert listing.passed == {
        "hidden": ["cat/.x.png"],
        "of the file system": ["cat/@eaDir"],
        "of lora_vit's own": ["cat/deep/own"],
        "links in a circle": ["cat/deep/back", "cat/deep/up"],
        "broken links": ["cat/gone"],
        "no images": ["cat/notes.txt"],
    }


class Reading:
    """Digests of files below ``root``, and the names of those that were read for them."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.names = root, []
        whole = Path.read_bytes

        def read(path):
            self.names.append(path.name)
            return whole(path)

        monkeypatch.setattr(Path, "read_bytes", read)

    def assert_digests(self, names: list[str], read: list[str]) -> None:
        """The right digests of ``names``, in their order, while exactly ``read`` are read."""
        self.names.clear()
        found = digests_of(self.root, names, self.root.parent / "cache")
        assert found is not None
        assert (found.dtype, found.shape) == (np.uint8, (len(names), 32))
        assert sorted(self.names) == sorted(read)
        for row, name in zip(found, names, strict=True):
            assert bytes(row) == hashlib.sha256((self.root / name).read_bytes()).digest()


@pytest.fixture
def reading(tmp_path, monkeypatch) -> Reading:
    return Reading(tmp_path / "top", monkeypatch)


def test_files_are_read_once_whatever_is_asked_for(reading, settled, tmp_path, capsys):
    """Of 600 files in pieces of 256; of other files, in another order and of fewer; each folder by itself."""
    names = [f"{i}.png" for i in range(600)]
    fill(tmp_path / "top", *names, "new.png")
    digests_of(reading.root, names, tmp_path / "other")
    digests_of(reading.root, names[:255], tmp_path / "another")
    assert re.findall(r"reading images: (\d+) images in", capsys.readouterr().out) == ["600"], "no bar for few"
    assert digests_of(reading.root, names, tmp_path / "cache", fetch=False) is None
    assert not (tmp_path / "cache").exists()
    reading.assert_digests(names, names)
    reading.assert_digests([*names[10:3:-1], "new.png"], ["new.png"])
    reading.assert_digests([*names, "new.png"], [])
    assert digests_of(reading.root, names, tmp_path / "cache", fetch=False) is not None
    reading.root = fill(tmp_path / "twin", *names[:2])
    reading.assert_digests(names[:2], names[:2])
    assert len(list((tmp_path / "cache").glob("facts-*.npz"))) == 2


@pytest.mark.parametrize("field", ["st_size", "st_mtime_ns", "st_ctime_ns", "st_ino"])
def test_a_file_is_read_again_where_anything_of_it_changed(field, reading, settled, monkeypatch):
    """Also to an inode as large as they get."""
    fill(reading.root, "a.png", "b.png")
    reading.assert_digests(["a.png", "b.png"], ["a.png", "b.png"])
    whole = os.stat

    def stat(path, **options):
        found = whole(path, **options)
        if not str(path).endswith("b.png"):
            return found
        values = {name: getattr(found, name) for name in ("st_mode", "st_size", "st_ino", "st_mtime_ns", "st_ctime_ns")}
        return SimpleNamespace(**values | {field: 2**64 - 1 if field == "st_ino" else values[field] + 1})

    monkeypatch.setattr(files.os, "stat", stat)
    reading.assert_digests(["a.png", "b.png"], ["b.png"])


@pytest.mark.parametrize(("age", "again"), [(0.0, True), (1.9, True), (30.0, False)])
def test_what_changed_a_moment_ago_is_read_again(age, again, reading, monkeypatch):
    """Within 2 s of its change, by the clock at reading; the files' own times do not matter."""
    fill(reading.root, "a.png", "b.png")
    os.utime(reading.root / "b.png", ns=(0, 0))
    changed = os.stat(reading.root / "b.png").st_ctime_ns
    monkeypatch.setattr(files.time, "time_ns", lambda: changed + int(age * 1e9))
    reading.assert_digests(["b.png"], ["b.png"])
    reading.assert_digests(["b.png"], ["b.png"] * again)


@pytest.mark.parametrize("damage", ["cut", "names", "rows"])
def test_kept_digests_that_are_damaged_are_read_again(damage, reading, settled, tmp_path):
    names = ["a.png", "b.png"]
    fill(reading.root, *names)
    reading.assert_digests(names, names)
    (store,) = (tmp_path / "cache").glob("facts-*.npz")
    if damage == "cut":
        store.write_bytes(store.read_bytes()[:50])
    else:
        with np.load(store) as arrays:
            kept = dict(arrays)
        np.savez(store, **{**kept, damage: kept[damage][:1]})
    reading.assert_digests(names, names)


def test_another_run_that_has_just_read_the_files_is_made_use_of(reading, settled, monkeypatch):
    """It held the lock meanwhile."""
    fill(reading.root, "a.png", "b.png")
    reading.assert_digests(["a.png"], ["a.png"])
    whole = files.locked_in

    def as_if_waited(cache_dir, what):
        monkeypatch.setattr(files, "locked_in", whole)
        digests_of(reading.root, ["b.png"], cache_dir)
        return whole(cache_dir, what)

    monkeypatch.setattr(files, "locked_in", as_if_waited)
    reading.assert_digests(["a.png", "b.png"], ["b.png"])


def test_what_cannot_be_read_or_written(tmp_path):
    root = fill(tmp_path / "top", "a.png")
    (root / "folder").mkdir()
    for name in ("gone.png", "folder"):
        with pytest.raises(OSError, match=name):
            digests_of(root, ["a.png", name], tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*/a\.png cannot be written \(File exists\): give another"):
        digests_of(root, ["a.png"], root / "a.png")


def test_a_lock_for_each_thing_in_the_cache(tmp_path):
    cache = tmp_path / "deep" / "cache"
    with locked_in(cache, "a"), locked_in(cache, "b"):
        assert len(list(cache.glob("*.lock"))) == 2
        for lock in cache.glob("*.lock"):
            with pytest.raises(BlockingIOError), locked(lock, wait=False):
                pass
    with locked_in(cache, "a"):
        assert len(list(cache.glob("*.lock"))) == 2
