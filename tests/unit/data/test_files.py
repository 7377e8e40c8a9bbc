"""Tiny-ImageNet, image folders, CIFAR and the decoded cache, on real files."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import pickle
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import decoded, trial_config
from PIL import Image

from lora_vit.data import tiny_imagenet
from lora_vit.data.cache import decode
from lora_vit.data.dataset import ImageData, forget, load_data
from lora_vit.data.tiny_imagenet import Source
from lora_vit.errors import ConfigError

WNIDS = ["n01", "n02", "n03"]


def config(tmp_path: Path, **changes):
    base = trial_config().data
    values = {"cache_dir": str(tmp_path / "cache"), "cache_size": None, "batch_size": 4, **changes}
    return dataclasses.replace(base, **values)


def fresh(data_config) -> ImageData:
    """The data set, its files listed anew."""
    forget()
    return load_data(data_config, quiet=True)


def picture(path: Path, seed: int, size=(64, 64), mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(path)


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A Tiny-ImageNet of three classes and ten images each, with the dirt that copies carry."""
    root = tmp_path / "data" / tiny_imagenet.FOLDER
    for c, wnid in enumerate(WNIDS):
        for i in range(10):
            picture(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 100 * c + i, mode="L" if i == 3 else "RGB")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
        (root / "train" / wnid / "images" / ".DS_Store").write_bytes(b"\0")
    for i in range(6):
        picture(root / "val" / "images" / f"val_{i}.JPEG", 900 + i)
    rows = [f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t1\t1" for i in range(6)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("n01\tgoldfish, carp\nn02\tcrane\nn03\tcrane, bird\n")
    return root


def load_tiny(tmp_path, **changes):
    changes = {"root": str(tmp_path / "data"), **changes}
    return fresh(config(tmp_path, name="tiny_imagenet", val_fraction=0.2, **changes))


def test_tiny_imagenet(tiny, tmp_path):
    data = load_tiny(tmp_path)
    assert data.images.shape == (30, 3, 64, 64)
    assert data.class_names == ["goldfish", "crane (n02)", "crane (n03)"]
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 18, "val": 6, "test": 6}
    expected = np.asarray(Image.open(tiny / "train" / "n02" / "images" / "n02_3.JPEG").convert("RGB"))
    assert (data.images[13] == expected.transpose(2, 0, 1)).all()
    assert data.labels[13] == 1


def test_official_val_is_a_further_test_set(tiny, tmp_path):
    data = load_tiny(tmp_path, official_val=True)
    assert len(data.splits["official_val"]) == 6
    assert data.labels[data.splits["official_val"]].tolist() == [0, 1, 2, 0, 1, 2]
    (tiny / "val" / "val_annotations.txt").unlink()
    with pytest.raises(ConfigError, match="official_val"):
        load_tiny(tmp_path, official_val=True)


def test_an_extra_class_is_passed_over_with_a_word(tiny, tmp_path):
    picture(tiny / "train" / "n99" / "images" / "x.JPEG", 1)
    data = load_tiny(tmp_path)
    assert len(data.class_names) == 3
    assert "1 folders of train/ that wnids.txt does not name (n99)" in data.passed_over


def test_a_class_without_images(tiny, tmp_path):
    for path in (tiny / "train" / "n03" / "images").glob("*.JPEG"):
        path.unlink()
    with pytest.raises(ConfigError, match="n03"):
        load_tiny(tmp_path)


def test_broken_images_are_named_together(tiny, tmp_path):
    for name in ("n01/images/n01_2.JPEG", "n03/images/n03_7.JPEG"):
        whole = (tiny / "train" / name).read_bytes()
        (tiny / "train" / name).write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ConfigError, match="2 broken images") as error:
        load_tiny(tmp_path)
    assert "n01_2.JPEG" in str(error.value)
    assert "n03_7.JPEG" in str(error.value)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").glob("images-*[!k]")) == []  # but for the lock


def zip_of(root: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, f"{root.name}/{path.relative_to(root)}")
    return target


def test_a_zip_in_the_root_is_unpacked(tiny, tmp_path):
    (tmp_path / "zipped").mkdir()
    zip_of(tiny, tmp_path / "zipped" / "tiny-imagenet-200.zip")
    a, b = load_tiny(tmp_path), load_tiny(tmp_path, root=str(tmp_path / "zipped"))
    assert a.fingerprint == b.fingerprint
    assert (a.images[:] == b.images[:]).all()


@pytest.mark.parametrize("name", ["../outside.txt", "/absolute.txt"])
def test_an_archive_with_a_path_outside_is_refused(name, tiny, tmp_path):
    (tmp_path / "zipped").mkdir()
    path = zip_of(tiny, tmp_path / "zipped" / "tiny-imagenet-200.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    with pytest.raises(ConfigError, match="unsafe path"):
        load_tiny(tmp_path, root=str(path.parent))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert not (tmp_path / "outside.txt").exists()


def test_a_damaged_archive(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny-imagenet-200.zip").write_bytes(b"PK not a zip")
    with pytest.raises(ConfigError, match="damaged"):
        load_tiny(tmp_path)


@pytest.fixture
def server(tiny, tmp_path):
    """A real web server with the archive; the first answer breaks off half way, later ones honour ranges."""
    archive = zip_of(tiny, tmp_path / "published.zip").read_bytes()
    ranges: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            ranges.append(wanted)
            first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(archive) - first))
            self.end_headers()
            end = len(archive) // 2 if len(ranges) == 1 else len(archive)
            self.wfile.write(archive[first:end])

        def log_message(self, *args: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    source = Source(
        f"http://127.0.0.1:{httpd.server_port}/x.zip",
        len(archive),
        hashlib.md5(archive, usedforsecurity=False).hexdigest(),
    )
    yield source, ranges
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_download_goes_on_where_it_broke_off(server, tmp_path, monkeypatch):
    source, ranges = server
    monkeypatch.setattr(tiny_imagenet, "PUBLISHED", source)
    root = tmp_path / "fresh"
    absent = config(tmp_path, name="tiny_imagenet", root=str(root), val_fraction=0.2)
    with pytest.raises(ConfigError, match="broke off"):
        fresh(absent)
    assert [p.name for p in root.iterdir()] == ["tiny-imagenet-200.zip.part"]
    data = fresh(absent)
    assert len(data.images) == 30
    assert ranges == [None, f"bytes={source.size // 2}-"]
    assert [p.name for p in root.iterdir()] == [tiny_imagenet.FOLDER]


def test_a_wrong_file_is_not_kept(server, tmp_path):
    source, ranges = server
    ranges.append("whole from now on")
    wrong = dataclasses.replace(source, md5="0" * 32)
    with pytest.raises(ConfigError, match="md5"):
        tiny_imagenet.download(tmp_path / "fresh", wrong, True)
    assert list((tmp_path / "fresh").iterdir()) == []


def test_no_network_says_what_to_do(tmp_path):
    nowhere = Source("http://127.0.0.1:9/x.zip", 1, "")
    with pytest.raises(ConfigError, match="experiment=quickstart") as error:
        tiny_imagenet.download(tmp_path / "fresh", nowhere, True)
    assert "tiny-imagenet-200.zip" in str(error.value)


@pytest.mark.slow
def test_real_tiny_imagenet(tiny_imagenet_zip, tmp_path):
    data = load_data(config(tmp_path, name="tiny_imagenet", root=str(_link(tiny_imagenet_zip, tmp_path))), quiet=True)
    assert data.images.shape == (20_000, 3, 64, 64)
    assert len(data.class_names) == len(set(data.class_names)) == 200
    assert (np.bincount(data.labels[data.splits["val"]]) == 20).all()  # the fake data's 0.2


def _link(archive: Path, tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / archive.name).symlink_to(archive)
    return tmp_path / "data"


def test_image_folder(tmp_path):
    sizes = [(80, 60), (60, 80), (33, 41)]
    for c in ("cat", "dog"):
        for i in range(10):
            picture(tmp_path / "images" / c / f"{i}{'.png' if i % 2 else '.JPG'}", i, sizes[i % 3])
    (tmp_path / "images" / "cat" / "notes.txt").write_text("no image")
    data = fresh(config(tmp_path, name="imagefolder", root=str(tmp_path / "images"), cache_size=32))
    assert data.images.shape == (20, 3, 32, 32)
    assert data.class_names == ["cat", "dog"]
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 12, "val": 4, "test": 4}


def test_given_splits_are_kept(tmp_path):
    root = tmp_path / "images"
    for part, count in (("train", 10), ("val", 3)):
        for c in ("cat", "dog"):
            for i in range(count):
                picture(root / part / c / f"{i}.png", i, (20, 20))
    data = fresh(config(tmp_path, name="imagefolder", root=str(root), cache_size=16))
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 16, "val": 6, "test": 4}
    picture(root / "val" / "bird" / "0.png", 0)
    with pytest.raises(ConfigError, match="'bird'"):
        fresh(config(tmp_path, name="imagefolder", root=str(root), cache_size=16))


@pytest.mark.parametrize("kind", ["empty", "one class", "empty class", "missing"])
def test_folders_that_cannot_be_used(kind, tmp_path):
    root = tmp_path / "images"
    if kind != "missing":
        root.mkdir()
    if kind in ("one class", "empty class"):
        picture(root / "cat" / "0.png", 0)
    if kind == "empty class":
        (root / "dog").mkdir()
    with pytest.raises(ConfigError) as error:
        fresh(config(tmp_path, name="imagefolder", root=str(root), cache_size=16))
    assert "images" in str(error.value)
    assert "\n" not in str(error.value)


def test_cache_is_shared_and_follows_the_files(tmp_path):
    for i in range(4):
        picture(tmp_path / "a" / f"{i}.png", i, (12, 12))
    names = [f"{i}.png" for i in range(4)]
    first = decoded(tmp_path / "a", names, None, str(tmp_path / "cache"), True)
    caches = sorted((tmp_path / "cache").glob("*.npy"))
    stamp = caches[0].stat().st_mtime_ns
    again = decoded(tmp_path / "a", names, None, str(tmp_path / "cache"), True)
    assert caches[0].stat().st_mtime_ns == stamp
    assert (first[:] == again[:]).all()
    assert isinstance(first, np.memmap)
    picture(tmp_path / "a" / "2.png", 77, (12, 12))
    changed = decoded(tmp_path / "a", names, None, str(tmp_path / "cache"), True)
    assert (changed[2] != first[2]).any()
    assert (changed[1] == first[1]).all()


def test_images_of_several_sizes_need_a_cache_size(tmp_path):
    picture(tmp_path / "a" / "0.png", 0, (12, 12))
    picture(tmp_path / "a" / "1.png", 0, (14, 12))
    with pytest.raises(ConfigError, match="cache_size"):
        decoded(tmp_path / "a", ["0.png", "1.png"], None, str(tmp_path / "cache"), True)


def test_a_cache_larger_than_the_disk_is_refused_with_its_size(tmp_path, monkeypatch):
    picture(tmp_path / "a" / "0.png", 0, (12, 12))
    from collections import namedtuple

    from lora_vit.data import cache

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage(100, 0, 100))
    with pytest.raises(ConfigError, match=r"need 0\.0 GiB"):
        decoded(tmp_path / "a", ["0.png"], None, str(tmp_path / "cache"), True)


def test_decode_honours_orientation_and_names_a_broken_file(tmp_path):
    image = Image.new("RGB", (20, 10), (0, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg", None).shape == (3, 20, 10)
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ConfigError, match=r"text\.jpg"):
        decode(tmp_path / "text.jpg", 16)


def test_cifar10_from_its_own_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    base = tmp_path / "data" / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, values: dict[str, object]) -> str:
        (base / name).write_bytes(pickle.dumps(values))
        return hashlib.md5((base / name).read_bytes(), usedforsecurity=False).hexdigest()

    def batch(count: int) -> dict[str, object]:
        return {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(count)]}

    batches = {f"data_batch_{i}": batch(40) for i in range(1, 6)}
    monkeypatch.setattr(CIFAR10, "train_list", [[n, write(n, v)] for n, v in batches.items()])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", write("test_batch", batch(30))]])
    names = {"label_names": [f"name {i}" for i in range(10)]}
    meta = {"filename": "batches.meta", "key": "label_names", "md5": write("batches.meta", names)}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    data = fresh(config(tmp_path, name="cifar10", root=str(tmp_path / "data"), val_fraction=0.1, test_fraction=None))
    assert data.images.shape == (230, 3, 32, 32)
    assert {k: len(v) for k, v in data.splits.items()} == {"val": 20, "train": 180, "test": 30}
    assert (data.images[0].reshape(-1) == batches["data_batch_1"]["data"][0]).all()
    assert data.class_names[3] == "name 3"
