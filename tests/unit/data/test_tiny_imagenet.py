"""Tiny-ImageNet: finding, fetching and unpacking it, against a real web server and real (small) archives."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from lora_vit.config import DataConfig
from lora_vit.data import tiny_imagenet
from lora_vit.data.dataset import ImageData, forget, load_data
from lora_vit.data.tiny_imagenet import FOLDER, Source
from lora_vit.errors import ConfigError

ARCHIVE = f"{FOLDER}.zip"


def config(tmp_path: Path, root: Path, **changes) -> DataConfig:
    values = {
        "name": "tiny_imagenet",
        "root": str(root),
        "batch_size": 1,
        "augment": "none",
        "split_seed": 0,
        "val_fraction": 0.25,
        "test_fraction": 0.25,
        "train_per_class": None,
        "official_val": False,
        "cache_size": None,
        "cache_dir": str(tmp_path / "cache"),
    }
    return DataConfig(**{**values, **changes})


def load(tmp_path: Path, root: Path, source: Source | None = None, **changes) -> ImageData:
    source = source or Source("http://127.0.0.1:9/not-to-be-asked.zip", 1, "")
    with mock.patch.object(tiny_imagenet, "PUBLISHED", source):
        forget()
        return load_data(config(tmp_path, root, **changes), True)


def make(folder: Path, shade: int = 0) -> Path:
    """Two classes of four plain 8x8 images, and two official val images; grey levels from ``shade`` up."""
    for wnid in ("n2", "n1"):  # wnids.txt has its own order
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(4):
            level = shade + 10 * (1 + i) + (100 if wnid == "n1" else 0)
            Image.new("RGB", (8, 8), (level, level, level)).save(
                folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            )
    (folder / "val" / "images").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (8, 8), (250 + i, 0, 0)).save(folder / "val" / "images" / f"val_{i}.JPEG")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\t0\t0\t7\t7\nval_1.JPEG\tn2\t0\t0\t7\t7\n")
    (folder / "wnids.txt").write_text("n2\nn1\n")
    (folder / "words.txt").write_text("n1\ttabby, tabby cat\nn2\tsea slug, nudibranch\nn3\tunused\n")
    return folder


def zipped(folder: Path, target: Path, prefix: str = f"{FOLDER}/") -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, f"{prefix}{path.relative_to(folder)}")
    return target


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- finding it


@pytest.mark.parametrize("place", ["the folder itself", "its parent", "another name"])
def test_an_extracted_folder(place, tmp_path):
    folder = make(tmp_path / "data" / ("pictures" if place == "another name" else FOLDER))
    data = load(tmp_path, folder.parent if place == "its parent" else folder)
    assert data.class_names == ["sea slug", "tabby"]
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert np.abs(data.images[:, 0, 0, 0].astype(int) - [10, 20, 30, 40, 110, 120, 130, 140]).max() <= 2


@pytest.mark.parametrize("prefix", [f"{FOLDER}/", "", "renamed/"])
@pytest.mark.parametrize("given", ["the zip", "its folder"])
def test_a_zip(prefix, given, tmp_path):
    archive = zipped(make(tmp_path / "made"), tmp_path / "data" / ARCHIVE, prefix)
    data = load(tmp_path, archive if given == "the zip" else archive.parent)
    assert len(data.images) == 8
    assert names_in(tmp_path / "data") == [FOLDER, ARCHIVE]
    assert load(tmp_path, archive).fingerprint == data.fingerprint


def test_the_published_name_goes_before_a_subset(tmp_path):
    zipped(make(tmp_path / "made", 7), tmp_path / "data" / f"{FOLDER}-subset.zip")
    zipped(make(tmp_path / "all"), tmp_path / "data" / ARCHIVE)
    assert abs(int(load(tmp_path, tmp_path / "data").images[0, 0, 0, 0]) - 10) <= 2


def test_a_zip_that_was_replaced_since_it_was_unpacked(tmp_path):
    """Else the old images would be used without a word."""
    archive = zipped(make(tmp_path / "a"), tmp_path / "data" / "my.zip")
    first = load(tmp_path, archive).fingerprint
    os.utime(tmp_path / "data" / "my", (0, 0))  # as unzip sets it, and copies
    assert load(tmp_path, archive).fingerprint == first
    zipped(make(tmp_path / "b", shade=5), archive)
    with pytest.raises(ConfigError, match=r"my\.zip is another one than .*data/my was unpacked from: remove that"):
        load(tmp_path, archive)
    shutil.rmtree(tmp_path / "data" / "my")
    assert load(tmp_path, archive).fingerprint != first


def test_two_zips_of_other_names_are_not_guessed_between(tmp_path):
    for name in ("a", "b"):
        zipped(make(tmp_path / name), tmp_path / "data" / f"{FOLDER}-{name}.zip")
    with pytest.raises(ConfigError, match=r"-a\.zip, .*-b\.zip"):
        load(tmp_path, tmp_path / "data")


def test_a_zip_in_a_read_only_folder_is_unpacked_in_the_cache(tmp_path, monkeypatch):
    """Two zips of one name in two such folders are two data sets."""
    first = zipped(make(tmp_path / "a"), tmp_path / "x" / ARCHIVE)
    second = zipped(make(tmp_path / "b", 7), tmp_path / "y" / ARCHIVE)
    os.utime(first, ns=(0, 0))
    access = os.access
    # the tests may run as root, whom no permission keeps from writing
    monkeypatch.setattr(os, "access", lambda p, mode: p not in (first.parent, second.parent) and access(p, mode))
    one, other = load(tmp_path, first.parent), load(tmp_path, second.parent)
    assert names_in(first.parent) == names_in(second.parent) == [ARCHIVE]
    assert (one.images[0] != other.images[0]).all()


def test_a_zip_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.zip does not exist"):
        load(tmp_path, tmp_path / "nowhere.zip")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("given", ["data/some/train", "data"])
def test_one_level_off(given, tmp_path):
    make(tmp_path / "data" / "some")
    assert len(load(tmp_path, tmp_path / given).images) == 8


def test_half_a_folder_is_not_taken_for_the_data(tmp_path):
    (make(tmp_path / "data" / FOLDER) / "wnids.txt").unlink()
    with pytest.raises(ConfigError, match=r"is not whole, it lacks wnids\.txt or train/: unpack"):
        load(tmp_path, tmp_path / "data")


# ---- archives that cannot be used


def damage_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_content(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday/photo.txt", "x")


def link(path: Path) -> None:
    entry = zipfile.ZipInfo(f"{FOLDER}/train/link")
    entry.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, "/etc")


def encrypted(path: Path) -> None:
    """Set the flag that says so, in every entry of the archive."""
    content = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(mark)
        while place >= 0:
            content[place + at] |= 1
            place = content.find(mark, place + 4)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (damage_middle, "damaged"),
        (cut, "damaged"),
        (encrypted, "damaged"),
        (other_content, "not Tiny-ImageNet"),
        (link, "unsafe path"),
    ],
)
def test_an_archive_that_cannot_be_used_leaves_nothing(harm, words, tmp_path):
    archive = zipped(make(tmp_path / "made"), tmp_path / "data" / ARCHIVE)
    harm(archive)
    with pytest.raises(ConfigError, match=words) as error:
        load(tmp_path, tmp_path / "data")
    assert str(archive) in str(error.value)
    assert "\n" not in str(error.value)
    assert names_in(tmp_path / "data") == [ARCHIVE]


# ---- downloading it


class Server(http.server.ThreadingHTTPServer):
    """Serves one archive; ``behaviour`` is how, and may be changed between requests."""

    daemon_threads = True

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.behaviour = content, "good"
        self.ranges: list[str | None] = []

    @property
    def source(self) -> Source:
        digest = hashlib.md5(self.content, usedforsecurity=False).hexdigest()
        return Source(f"http://127.0.0.1:{self.server_port}/{ARCHIVE}", len(self.content), digest)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content, behaviour = self.server.content, self.server.behaviour
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        if behaviour == "silent":
            self.close_connection = True
            return
        if behaviour == "missing":
            self.send_error(404)
            return
        if behaviour == "login page":
            content, wanted = b"<html>please log in</html>", None
        if behaviour == "knows no ranges":
            wanted = None
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        if behaviour != "breaks off, no length":
            self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        self.wfile.write(content[first : len(content) // 2 if behaviour.startswith("breaks off") else None])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    server = Server(zipped(make(tmp_path / "made"), tmp_path / "published" / "it.zip").read_bytes())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_download(server, tmp_path):
    data = load(tmp_path, tmp_path / "data", server.source)
    assert len(data.images) == 8
    assert names_in(tmp_path / "data") == [FOLDER]
    assert load(tmp_path, tmp_path / "data").fingerprint == data.fingerprint


@pytest.mark.parametrize("break_off", ["breaks off", "breaks off, no length"])
@pytest.mark.parametrize("then", ["good", "knows no ranges"])
def test_an_interrupted_download_goes_on(break_off, then, server, tmp_path):
    server.behaviour = break_off
    with pytest.raises(ConfigError, match="the same command goes on") as error:
        load(tmp_path, tmp_path / "data", server.source)
    half = len(server.content) // 2
    assert f"{half:,} of {len(server.content):,}" in str(error.value)
    assert (tmp_path / "data" / f"{ARCHIVE}.part").read_bytes() == server.content[:half]
    server.behaviour = then
    assert len(load(tmp_path, tmp_path / "data", server.source).images) == 8
    assert server.ranges == [None, f"bytes={half}-"]


@pytest.mark.parametrize("behaviour", ["silent", "missing", "login page"])
def test_a_server_without_the_file(behaviour, server, tmp_path):
    """What an earlier try left is still there for the next."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{ARCHIVE}.part").write_bytes(server.content[:50])
    server.behaviour = behaviour
    with pytest.raises(ConfigError, match="experiment=quickstart") as error:
        load(tmp_path, tmp_path / "data", server.source)
    assert "\n" not in str(error.value)
    assert (tmp_path / "data" / f"{ARCHIVE}.part").read_bytes() == server.content[:50]


@pytest.mark.parametrize("wrong", ["md5", "larger"])
def test_a_wrong_file_is_refused_and_not_kept(wrong, server, tmp_path):
    source = dataclasses.replace(server.source, md5="0" * 32)
    if wrong == "larger":
        server.behaviour = "breaks off, no length"  # of a content twice as long
        server.content *= 2
        source = dataclasses.replace(source, size=len(server.content) // 2 - 10)
    with pytest.raises(ConfigError, match="md5"):
        load(tmp_path, tmp_path / "data", source)
    assert names_in(tmp_path / "data") == []


def test_runs_that_start_together_fetch_it_once(server, tmp_path):
    """Threads take the place of processes: each opens the lock file itself, as a process would."""

    def find(_: int) -> Path:
        return tiny_imagenet.find_folder(tmp_path / "data", tmp_path / "cache", True, server.source)

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(find, range(4)))
    assert found == {tmp_path / "data" / FOLDER}
    assert server.ranges == [None]


# ---- what is in it


def remove_annotations(folder: Path) -> None:
    (folder / "val" / "val_annotations.txt").unlink()


def remove_val_images(folder: Path) -> None:
    shutil.rmtree(folder / "val" / "images")


def remove_one_val_image(folder: Path) -> None:
    (folder / "val" / "images" / "val_1.JPEG").unlink()


def annotate_other_classes(folder: Path) -> None:
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn7\nval_1.JPEG\n")


@pytest.mark.parametrize("harm", [remove_annotations, remove_val_images, remove_one_val_image, annotate_other_classes])
def test_official_val_must_be_whole(harm: Callable[[Path], None], tmp_path):
    folder = make(tmp_path / FOLDER)
    assert load(tmp_path, folder, official_val=True).splits["official_val"].tolist() == [8, 9]
    assert load(tmp_path, folder, official_val=True).labels[8:].tolist() == [1, 0]
    harm(folder)
    with pytest.raises(ConfigError, match=r"val_annotations\.txt.*: extract the archive anew"):
        load(tmp_path, folder, official_val=True)
    assert len(load(tmp_path, folder).images) == 8  # without it, nothing of that matters


def test_official_images_without_a_class_are_told(tmp_path):
    """Of a list that was cut off, or whose other classes are not in wnids.txt."""
    folder = make(tmp_path / FOLDER)
    annotations = folder / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().splitlines()[1] + "\n")
    data = load(tmp_path, folder, official_val=True)
    (left,) = {"val_0.JPEG", "val_1.JPEG"} - {annotations.read_text().split("\t")[0]}
    assert data.passed_over == (f"1 of val/images without a class in val_annotations.txt (val/images/{left})",)


@pytest.mark.parametrize("content", ["", "n1\n", "n1\nn2\nn1\n"])
def test_a_list_of_classes_that_cannot_be(content, tmp_path):
    folder = make(tmp_path / FOLDER)
    (folder / "wnids.txt").write_text(content)
    with pytest.raises(ConfigError, match=r"wnids\.txt must name two or more different"):
        load(tmp_path, folder)


def test_names_without_words(tmp_path):
    folder = make(tmp_path / FOLDER)
    (folder / "words.txt").write_text("n1\t\n")
    assert load(tmp_path, folder).class_names == ["n2", "n1"]
    (folder / "words.txt").unlink()
    assert load(tmp_path, folder).class_names == ["n2", "n1"]


@pytest.mark.slow
def test_the_real_subset_with_its_official_val(tiny_imagenet_zip, tmp_path):
    """22,000 real images, some of them grey: classes, splits and a few pixels against Pillow."""
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / tiny_imagenet_zip.name
    archive.symlink_to(tiny_imagenet_zip)
    data = load(tmp_path, tmp_path / "data", val_fraction=0.1, test_fraction=0.1, official_val=True)
    assert data.images.shape == (22_000, 3, 64, 64)
    assert {k: len(v) for k, v in data.splits.items()} == {
        "train": 16_000,
        "val": 2_000,
        "test": 2_000,
        "official_val": 2_000,
    }
    for name, per_class in (("train", 80), ("val", 10), ("test", 10), ("official_val", 10)):
        assert (np.bincount(data.labels[data.splits[name]]) == per_class).all()
    assert data.class_names[0] == "Egyptian cat"
    assert len(set(data.class_names)) == 200
    folder = tmp_path / "data" / archive.stem
    wnids = (folder / "wnids.txt").read_text().split()
    for label in (0, 77, 199):
        images = sorted((folder / "train" / wnids[label] / "images").iterdir())
        for i in (0, 99):
            with Image.open(images[i]) as image:
                expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
            np.testing.assert_array_equal(data.images[100 * label + i], expected)
