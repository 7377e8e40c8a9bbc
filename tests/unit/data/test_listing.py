"""Which files of a folder are images, what is passed over, and whether they are read again."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_vit.data import files
from lora_vit.data.files import (
    PassedOver,
    cannot_write,
    cores,
    digests_of,
    folders_in,
    image_endings,
    images_below,
    is_own,
    locked_in,
)
from lora_vit.errors import ConfigError
from lora_vit.files import locked


@pytest.fixture
def settled(monkeypatch):
    """Files are taken as written long ago."""
    monkeypatch.setattr(files, "_UNSETTLED", -(10**12))


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []
    whole = files._sha256
    monkeypatch.setattr(files, "_sha256", lambda root, name: names.append(name) or whole(root, name))
    return names


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_what_is_passed_over_is_counted_and_three_are_named():
    passed = PassedOver()
    for i in range(4):
        passed.add("no images", f"{i}.txt")
    for i in range(3):
        passed.add("hidden", f".{i}")
    passed.add("broken links", os.fsdecode(b"\xe9"))
    assert passed.lines() == (
        "4 no images (0.txt, 1.txt, 2.txt, ...)", "3 hidden (.0, .1, .2)", "1 broken links (\\xe9)",
    )  # fmt: skip
    many = PassedOver({"hidden": ["x"] * 1234})
    assert many.lines() == ("1,234 hidden (x, x, x, ...)",)
    assert PassedOver().lines() == ()


def test_endings_are_those_that_pillow_reads():
    endings = image_endings()
    assert {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"} <= endings
    assert not {".eps", ".wmf", ".mpg", ".hdf", ".grib", ".bufr"} & endings, "known by name only"
    assert not {".pdf", ".txt", ".npz"} & endings, "written or not known at all"
    assert endings <= set(Image.registered_extensions())


@pytest.mark.parametrize("name", ["record.json", "sweep.json", ".lock", "checkpoint.pt"])
def test_a_folder_that_training_wrote_is_told_by_its_files(name, tmp_path):
    assert not is_own(fill(tmp_path / "a", "0.png").resolve(), tmp_path / "cache")
    assert is_own(str(fill(tmp_path / "a", name)), tmp_path / "cache")


def test_the_cache_and_the_outputs_are_ours(tmp_path):
    cache = fill(tmp_path / "cache", "x").resolve()
    (tmp_path / "link").symlink_to(cache)
    assert is_own(tmp_path / "link", tmp_path / "cache")
    for below in ("runs", "sweeps"):
        outputs = fill(tmp_path / below / "outputs", "mine.txt")
        assert not is_own(outputs, cache)
        fill(outputs, f"{below}/x")
        assert is_own(outputs, cache)
    assert not is_own(fill(tmp_path / "other", "runs/x"), cache), "of another name"


def test_folders_of_classes_in_order(tmp_path):
    cache = tmp_path / "cache"
    root = fill(tmp_path / "top", "b/0", ".git/x", "own/record.json", "a/0", "IMG.PNG", "notes.txt")
    (root / "c").symlink_to(root / "a")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    passed = PassedOver()
    assert folders_in(root, cache, passed) == ["a", "b", "c"]
    assert passed.names == {
        "hidden": [".git"],
        "images outside the class folders": ["IMG.PNG"],
        "broken links": ["gone"],
        "no images": ["notes.txt"],
        "of lora_vit's own": ["own"],
    }


def test_folders_of_file_servers_are_passed_over(tmp_path):
    """Their thumbnails of the same images would be in train and val."""
    root = fill(tmp_path / "top", "cat/0.png", "cat/@eaDir/0.png/SYNOPHOTO_THUMB_XL.jpg", "__MACOSX/cat/._0.png")
    (root / "lost+found").mkdir()
    passed = PassedOver()
    assert folders_in(root, tmp_path, passed) == ["cat"]
    assert images_below(root, "cat", tmp_path, passed) == ["cat/0.png"]
    assert passed.names == {"of the file system": ["__MACOSX", "lost+found", "cat/@eaDir"]}


def test_images_of_a_class_in_order_with_what_lies_below(tmp_path):
    root = fill(
        tmp_path / "top", "cat/b.png", "cat/a.JPG", "cat/deep/er/c.gif", "cat/.x.png", "cat/deep/own/record.json",
        "cat/notes.txt", "dog/d.png",
    )  # fmt: skip
    (root / "cat" / "deep" / "back").symlink_to(root / "cat")
    (root / "cat" / "deep" / "up").symlink_to(tmp_path)  # with the dogs, and what lies beside the data
    (root / "cat" / "also").symlink_to(root / "dog")
    (root / "cat" / "twice").symlink_to(root / "dog")
    (root / "cat" / "gone").symlink_to(tmp_path / "nowhere")
    passed = PassedOver()
    assert images_below(root, "cat", tmp_path / "cache", passed) == [
        "cat/a.JPG", "cat/also/d.png", "cat/b.png", "cat/deep/er/c.gif", "cat/twice/d.png",
    ]  # fmt: skip
    assert passed.names == {
        "hidden": ["cat/.x.png"],
        "of lora_vit's own": ["cat/deep/own"],
        "links that lead back": ["cat/deep/back", "cat/deep/up"],
        "broken links": ["cat/gone"],
        "no images": ["cat/notes.txt"],
    }


def digests(root: Path, names: list[str]) -> np.ndarray:
    return digests_of(root, names, root.parent / "cache", True)


def expected(root: Path, names: list[str]) -> list[bytes]:
    return [hashlib.sha256((root / name).read_bytes()).digest() for name in names]


def test_digests_are_the_files_sha256_in_the_order_asked_for(tmp_path, read, settled):
    """Of 600 files in pieces of 256; of other files, in another order and of fewer."""
    names = [f"{i}.png" for i in range(600)]
    root = fill(tmp_path / "top", *names)
    found = digests(root, names)
    assert (found.dtype, found.shape) == (np.uint8, (600, 32))
    assert [bytes(row) for row in found] == expected(root, names)
    assert sorted(read) == sorted(names)
    backwards = [*names[10:3:-1], "new.png"]
    fill(root, "new.png")
    assert [bytes(row) for row in digests(root, backwards)] == expected(root, backwards)
    assert read[600:] == ["new.png"]
    assert [bytes(row) for row in digests(root, [*names, "new.png"])] == expected(root, [*names, "new.png"])
    assert len(read) == 601, "the others' digests were kept"
    assert len(list((tmp_path / "cache").glob("files-*.npz"))) == 1
    fill(tmp_path / "twin", *names[:2])
    digests(tmp_path / "twin", names[:2])
    assert len(list((tmp_path / "cache").glob("files-*.npz"))) == 2, "each folder has its own"


@pytest.mark.parametrize("what", ["size", "time of writing", "time of change", "inode"])
def test_a_file_is_read_again_where_anything_of_it_changed(what, tmp_path, read, settled, monkeypatch):
    names = ["a.png", "b.png"]
    root = fill(tmp_path / "top", *names)
    digests(root, names)
    whole = os.stat
    field = {"size": "st_size", "time of writing": "st_mtime_ns", "time of change": "st_ctime_ns", "inode": "st_ino"}

    def changed(path, **options):
        found = whole(path, **options)
        if not str(path).endswith("b.png"):
            return found
        fields = {name: getattr(found, name) for name in ("st_mode", "st_size", "st_ino", "st_mtime_ns", "st_ctime_ns")}
        fields[field[what]] += 1
        return os_stat(**fields)

    monkeypatch.setattr(files.os, "stat", changed)
    digests(root, names)
    assert read[2:] == ["b.png"]


class os_stat:  # noqa: N801  (stands for os.stat_result)
    def __init__(self, **fields: int):
        self.__dict__.update(fields)


def test_large_inodes_fit(tmp_path, monkeypatch):
    root = fill(tmp_path / "top", "a.png")
    fields = {"st_mode": stat.S_IFREG, "st_size": 5, "st_ino": 2**64 - 1, "st_mtime_ns": 0, "st_ctime_ns": 0}
    whole = os.stat
    monkeypatch.setattr(
        files.os, "stat", lambda p, **o: os_stat(**fields) if str(p).endswith("a.png") else whole(p, **o)
    )
    assert digests(root, ["a.png"]).shape == (1, 32)


@pytest.mark.parametrize(("age", "again"), [(0.0, True), (1.9, True), (30.0, False)])
def test_what_changed_a_moment_ago_is_read_again(age, again, tmp_path, read, monkeypatch):
    """Within 2 s of its change, by the clock at reading; the files' own times do not matter."""
    root = fill(tmp_path / "top", "a.png", "b.png")
    os.utime(root / "b.png", ns=(0, 0))
    changed = os.stat(root / "b.png").st_ctime_ns
    monkeypatch.setattr(files.time, "time_ns", lambda: changed + int(age * 1e9))
    for _ in range(2):
        digests(root, ["b.png"])
    assert read == ["b.png"] * (1 + again)


@pytest.mark.parametrize("damage", ["cut", "shape", "count"])
def test_kept_digests_that_are_damaged_are_read_again(damage, tmp_path, read, settled):
    names = ["a.png", "b.png"]
    root = fill(tmp_path / "top", *names)
    digests(root, names)
    (store,) = (tmp_path / "cache").glob("files-*.npz")
    if damage == "cut":
        store.write_bytes(store.read_bytes()[:50])
    else:
        with np.load(store) as arrays:
            kept = dict(arrays)
        kept["stats" if damage == "shape" else "digests"] = kept["stats" if damage == "shape" else "digests"][:1]
        np.savez(store, **kept)
    assert [bytes(row) for row in digests(root, names)] == expected(root, names)
    assert len(read) == 4


def test_a_file_that_is_gone_or_cannot_be_read(tmp_path):
    root = fill(tmp_path / "top", "a.png")
    (root / "folder").mkdir()
    for name, reason in (("gone.png", "No such file or directory"), ("folder", "Is a directory")):
        for names in (["a.png", name], [name, "a.png"]):
            with pytest.raises(ConfigError) as caught:
                digests(root, names)
            assert str(caught.value) == f"{root}/{name} cannot be read ({reason}): mend or remove it"


def test_a_cache_that_cannot_be_written(tmp_path):
    root = fill(tmp_path / "top", "a.png")
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ConfigError) as caught:
        digests(root, ["a.png"])
    assert str(caught.value) == f"data.cache_dir={tmp_path}/cache cannot be written (File exists): give another folder"
    assert "(no reason)" in str(cannot_write(tmp_path, OSError("no reason")))


def test_another_run_that_has_just_read_the_files_is_made_use_of(tmp_path, read, settled, monkeypatch):
    """It held the lock meanwhile."""
    root = fill(tmp_path / "top", "a.png", "b.png")
    digests(root, ["a.png"])
    whole = files.locked_in

    def as_if_waited(cache_dir, what):
        monkeypatch.setattr(files, "locked_in", whole)
        digests(root, ["b.png"])
        return whole(cache_dir, what)

    monkeypatch.setattr(files, "locked_in", as_if_waited)
    digests(root, ["a.png", "b.png"])
    assert read == ["a.png", "b.png"]


@pytest.mark.parametrize(("count", "quiet", "told"), [(256, False, True), (255, False, False), (256, True, False)])
def test_many_files_have_a_bar(count, quiet, told, tmp_path, monkeypatch):
    made, steps = [], []

    class Bar:
        def __init__(self, *arguments):
            made.append(arguments)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def advance(self, by):
            steps.append(by)

    monkeypatch.setattr("lora_vit.terminal.Progress", Bar)
    names = [f"{i}.png" for i in range(count)]
    digests_of(fill(tmp_path / "top", *names), names, tmp_path / "cache", quiet)
    assert made == [("reading images", count, not told)]
    assert sum(steps) == count


def test_cores_are_those_that_are_granted(monkeypatch):
    monkeypatch.setattr(files.os, "sched_getaffinity", lambda who: {2, 5, 7} if who == 0 else set(), raising=False)
    assert cores() == 3
    monkeypatch.delattr(files.os, "sched_getaffinity")
    for there, count in ((6, 6), (None, 1)):
        monkeypatch.setattr(files.os, "cpu_count", lambda there=there: there)
        assert cores() == count


def test_a_lock_for_each_thing_in_the_cache(tmp_path):
    cache = tmp_path / "deep" / "cache"
    with locked_in(cache, "a"), locked_in(cache, "b"):
        assert len(list(cache.glob("*.lock"))) == 2
        for lock in cache.glob("*.lock"):
            with pytest.raises(BlockingIOError), locked(lock, wait=False):
                pass
    with locked_in(cache, "a"):
        assert len(list(cache.glob("*.lock"))) == 2
