"""Tiny-ImageNet: finding, fetching and unpacking it, with a real web server and real (small) archives."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pictures import data_config, fresh, paint, refused, shades

from lora_vit.data import tiny_imagenet
from lora_vit.data.dataset import ImageData, Wanted
from lora_vit.data.tiny_imagenet import FOLDER

ARCHIVE = f"{FOLDER}.zip"
GREY = [10, 20, 30, 40, 110, 120, 130, 140]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(tiny_imagenet, "URL", f"http://127.0.0.1:9/{ARCHIVE}")


def load(tmp_path: Path, root: Path, **changes) -> ImageData:
    fractions = {"val_fraction": 0.25, "test_fraction": 0.25}
    return fresh(data_config(tmp_path, "tiny_imagenet", root=str(root), **{**fractions, **changes}))


def make(folder: Path, shade: int = 0) -> Path:
    """Two classes of four plain 8x8 images, and two official val images; grey levels from ``shade`` up."""
    for wnid, first in (("n2", 10), ("n1", 110)):  # wnids.txt has its own order
        for i in range(4):
            paint(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", shade + first + 10 * i)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
    for i in range(2):
        paint(folder / "val" / "images" / f"val_{i}.JPEG", 240 + i)
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\t0\t0\t7\t7\nval_1.JPEG\tn2\t0\t0\t7\t7\n")
    (folder / "wnids.txt").write_text("n2\nn1\n", encoding="utf-8-sig")  # with a byte order mark, as editors leave
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


@pytest.mark.parametrize(
    ("made", "root"),
    [(f"in/{FOLDER}", f"in/{FOLDER}"), (f"in/{FOLDER}", "in"), ("in/mine", "in/mine"), ("in/mine", "in")],
)
def test_an_unpacked_folder(made, root, tmp_path):
    make(tmp_path / made)
    data = load(tmp_path, tmp_path / root)
    assert data.class_names == ["sea slug", "tabby"]
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert np.abs(np.subtract(shades(data), GREY)).max() <= 2
    assert {name: len(ids) for name, ids in data.splits.items()} == {"train": 4, "val": 2, "test": 2}


@pytest.mark.parametrize("prefix", [f"{FOLDER}/", "", "renamed/"])
@pytest.mark.parametrize(
    ("name", "root"), [(ARCHIVE, "data"), (f"{FOLDER}-subset.zip", "data"), ("a.zip", "data/a.zip")]
)
def test_a_zip(prefix, name, root, tmp_path):
    """It is unpacked once, in the cache: its own folder may be a mount that cannot be written."""
    zipped(make(tmp_path / "made"), tmp_path / "data" / name, prefix)
    root, cache = tmp_path / root, tmp_path / "cache"
    assert tiny_imagenet.find(Wanted("tiny_imagenet", root, cache, fetch=False)) is None
    assert not cache.exists(), "a dry run reads nothing"
    data = load(tmp_path, root)
    assert data.fingerprint == load(tmp_path, tmp_path / "made").fingerprint
    assert names_in(tmp_path / "data") == [name]
    (unpacked,) = cache.glob(f"{FOLDER}-*")
    os.utime(unpacked / "wnids.txt", (7, 7))
    assert load(tmp_path, root).fingerprint == data.fingerprint
    assert (unpacked / "wnids.txt").stat().st_mtime == 7


def test_a_zip_that_was_replaced_since_it_was_unpacked(tmp_path):
    """Else the old images would be used without a word; two zips of one name in two folders likewise."""
    archive = zipped(make(tmp_path / "a"), tmp_path / "data" / ARCHIVE)
    first = load(tmp_path, archive)
    zipped(make(tmp_path / "b", shade=5), archive)
    assert np.abs(np.subtract(shades(load(tmp_path, archive)), shades(first)) - 5).max() <= 2


def test_several_sets_are_not_guessed_between(tmp_path):
    """But the published name goes before others."""
    for name in ("one", "two"):
        make(tmp_path / "sets" / name)
    assert "one, two: give one of them" in refused(load, tmp_path, tmp_path / "sets")
    for i, name in enumerate(("a", "bb")):
        zipped(make(tmp_path / name, i), tmp_path / "data" / f"{FOLDER}-{name}.zip")
    assert f"{FOLDER}-a.zip, {FOLDER}-bb.zip: give one of them" in refused(load, tmp_path, tmp_path / "data")
    zipped(make(tmp_path / "all", 7), tmp_path / "data" / ARCHIVE)
    assert abs(shades(load(tmp_path, tmp_path / "data"))[0] - 17) <= 2
    assert "nowhere.zip does not exist" in refused(load, tmp_path, tmp_path / "nowhere.zip")


def test_half_a_folder_and_a_folder_that_cannot_be_written(tmp_path):
    (make(tmp_path / "data" / FOLDER) / "wnids.txt").unlink()
    assert "lacks wnids.txt or train/: unpack" in refused(load, tmp_path, tmp_path / "data")
    (tmp_path / "file").write_text("x")
    assert "another data.root or data.cache_dir" in refused(load, tmp_path, tmp_path / "file" / "data")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_content(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday/photo.txt", "x")


def encrypted(path: Path) -> None:
    """Set the flag that says so, in every entry of the archive."""
    content = path.read_bytes()
    for mark in (b"PK\x03\x04\x14\0", b"PK\x01\x02\x14\x03\x14\0"):
        content = content.replace(mark + b"\0", mark + b"\1")
    path.write_bytes(content)


def altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 3] = bytes(len(content) // 3 - len(content) // 4)
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [altered, cut, encrypted, other_content])
def test_an_archive_that_cannot_be_used_leaves_nothing(harm, tmp_path):
    archive = zipped(make(tmp_path / "made"), tmp_path / "data" / ARCHIVE)
    harm(archive)
    said = "holds no wnids.txt and train/" if harm is other_content else "is damaged"
    assert f"{archive} {said}" in refused(load, tmp_path, tmp_path / "data")
    assert names_in(tmp_path / "data") == [ARCHIVE]
    assert not list((tmp_path / "cache").glob(f"*{FOLDER}*"))


@pytest.mark.parametrize("name", ["../../outside.txt", "/absolute-of-tiny-imagenet.txt"])
def test_nothing_is_unpacked_outside_its_folder(name, tmp_path):
    archive = zipped(make(tmp_path / "made"), tmp_path / "data" / ARCHIVE)
    link = zipfile.ZipInfo(f"{FOLDER}/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(name, "x")
        opened.writestr(link, "/etc")
    assert len(load(tmp_path, archive).images) == 8
    assert not [path for path in tmp_path.rglob("*outside*") if FOLDER not in str(path)]
    assert not Path(name).is_file()
    (link_is_a_file,) = (tmp_path / "cache").glob(f"{FOLDER}-*/link")
    assert not link_is_a_file.is_symlink()


class Server(http.server.ThreadingHTTPServer):
    """Serves one archive; ``behaviour`` is how, and may be changed between requests."""

    daemon_threads = True
    content, behaviour, served = b"", "good", 0


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content, behaviour = self.server.content, self.server.behaviour
        if behaviour == "missing":
            self.send_error(404)
            return
        if behaviour == "login page":
            content = b"<html>please log in</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.headers.get("Method") != "HEAD":  # so torchvision follows redirections
            self.server.served += 1
            self.wfile.write(content[: len(content) // 2 if behaviour == "breaks off" else None])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.content = zipped(make(tmp_path / "made"), tmp_path / "published" / "it.zip").read_bytes()
    monkeypatch.setattr(tiny_imagenet, "URL", f"http://127.0.0.1:{server.server_port}/{ARCHIVE}")
    monkeypatch.setattr(tiny_imagenet, "MD5", hashlib.md5(server.content, usedforsecurity=False).hexdigest())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_runs_that_start_together_fetch_it_once(server, tmp_path, capsys):
    """Threads take the place of processes: each opens the lock file itself, as a process would."""
    wanted = Wanted("tiny_imagenet", tmp_path / "data", tmp_path / "cache")
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda _: tiny_imagenet.find(wanted), range(4)))) == 4
    assert server.served == 1
    assert f"unpacking {ARCHIVE}: 22 files in" in capsys.readouterr().out
    assert names_in(tmp_path / "data") == [FOLDER]
    assert np.abs(np.subtract(shades(load(tmp_path, tmp_path / "data")), GREY)).max() <= 2


@pytest.mark.parametrize("behaviour", ["missing", "login page", "breaks off"])
def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(behaviour, server, tmp_path):
    server.behaviour = behaviour
    message = refused(load, tmp_path, tmp_path / "data")
    assert f"put {ARCHIVE} or {FOLDER}/ into {tmp_path}/data, or run experiment=quickstart" in message
    assert names_in(tmp_path / "data") == []


@pytest.mark.parametrize("harm", ["no annotations", "no images", "an image less", "other classes"])
def test_official_val_must_be_whole(harm, tmp_path):
    folder = make(tmp_path / FOLDER)
    data = load(tmp_path, folder, official_val=True)
    assert (data.splits["official_val"].tolist(), data.labels[8:].tolist()) == ([8, 9], [1, 0])
    if harm == "no annotations":
        (folder / "val" / "val_annotations.txt").unlink()
    elif harm == "no images":
        shutil.rmtree(folder / "val" / "images")
    elif harm == "an image less":
        (folder / "val" / "images" / "val_1.JPEG").unlink()
    else:
        (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn7\nval_1.JPEG\n")
    message = refused(load, tmp_path, folder, official_val=True)
    assert "val_annotations.txt" in message
    assert message.endswith(": extract the archive again")
    assert len(load(tmp_path, folder).images) == 8  # without it, nothing of that matters


def test_what_is_not_listed_is_passed_over_with_a_word(tmp_path):
    folder = make(tmp_path / FOLDER)
    paint(folder / "train" / "n99" / "images" / "x.JPEG")
    (folder / "val" / "val_annotations.txt").write_text("val_1.JPEG\tn2\t0\t0\t7\t7\n")  # a list that was cut off
    data = load(tmp_path, folder, official_val=True)
    assert len(data.class_names) == 2
    assert set(data.passed_over) == {
        "1 folder of train/ that wnids.txt does not name (n99)",
        "1 of val/images without a class in val_annotations.txt (val/images/val_0.JPEG)",
    }


@pytest.mark.parametrize("wnids", ["", "n1\n", "n1\nn2\nn1\n"])
def test_a_list_of_classes_that_cannot_be(wnids, tmp_path):
    folder = make(tmp_path / FOLDER)
    (folder / "wnids.txt").write_text(wnids)
    assert "wnids.txt must name two or more different" in refused(load, tmp_path, folder)
    (folder / "wnids.txt").write_text("n1\nn3\n")
    assert f"class n3 of wnids.txt has no images in {folder}/train/n3/images" in refused(load, tmp_path, folder)


@pytest.mark.parametrize(
    ("words", "names"),
    [("n1\t\n", ["n2", "n1"]), (None, ["n2", "n1"]), ("n1\tcrane\nn2\tcrane, bird\n", ["crane (n2)", "crane (n1)"])],
)
def test_names_of_classes(words, names, tmp_path):
    folder = make(tmp_path / FOLDER)
    (folder / "words.txt").unlink()
    if words is not None:
        (folder / "words.txt").write_text(words)
    assert load(tmp_path, folder).class_names == names


def test_real_images_with_their_official_val(tiny_imagenet_zip, tmp_path):
    """The first classes of the original, some images of which are grey."""
    with zipfile.ZipFile(tiny_imagenet_zip) as whole, zipfile.ZipFile(tmp_path / ARCHIVE, "w") as part:
        wnids = whole.read(f"{FOLDER}/wnids.txt").split()[:5]
        rows = whole.read(f"{FOLDER}/val/val_annotations.txt").splitlines(keepends=True)
        rows = [row for row in rows if row.split(b"\t")[1] in wnids]
        own = {"words.txt", *(wnid.decode() for wnid in wnids), *(row.split(b"\t")[0].decode() for row in rows)}
        for name in whole.namelist():
            if own & {*name.split("/")[1:]}:
                part.writestr(name, whole.read(name))
        part.writestr(f"{FOLDER}/wnids.txt", b"\n".join(wnids))
        part.writestr(f"{FOLDER}/val/val_annotations.txt", b"".join(rows))
    data = load(tmp_path, tmp_path / ARCHIVE, val_fraction=0.1, test_fraction=0.1, official_val=True)
    assert data.images.shape == (550, 3, 64, 64)
    for name, per_class in (("train", 80), ("val", 10), ("test", 10), ("official_val", 10)):
        assert (np.bincount(data.labels[data.splits[name]]) == per_class).all()
    assert (data.class_names[0], len(set(data.class_names))) == ("Egyptian cat", 5)
