"""Which data a figure belongs to: what the files contain, and nothing else."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import data_config, paint
from plain_trials import plain_trial

from lora_vit.config import TrialConfig, trial_id
from lora_vit.data import files
from lora_vit.data.dataset import content_of, forget
from lora_vit.errors import ConfigError
from lora_vit.resolve import identify, is_identified


@pytest.fixture
def pets(tmp_path) -> Path:
    """Two classes of ten images, all of the same size on disk."""
    for c, name in enumerate(("cat", "dog")):
        for i in range(10):
            paint(tmp_path / "pets" / name / f"{i}.bmp", 100 * c + i)
    return tmp_path / "pets"


@pytest.fixture
def trial(tmp_path):
    """A trial on a folder as a command would have it: the files are looked at again."""

    def identified(root: Path, fetch: bool = True, **changes) -> TrialConfig:
        forget()
        config = plain_trial()
        config.data = data_config(tmp_path, root=str(root), **changes)
        identify(config, fetch)
        return config

    return identified


def test_content_is_a_digest_of_classes_labels_parts_and_files():
    """Spelt out: another one would make every recorded trial another."""

    def content(names=("cat", "dog"), labels=(0, 1), parts=(("val", (1,)), ("train", (0,))), digests=bytes(range(64))):
        arrays = {name: np.array(ids) for name, ids in parts}
        rows = np.frombuffer(digests, np.uint8).reshape(32, 2).T
        return content_of(list(names), np.array(labels), arrays, rows)

    text = b'[["cat", "dog"], ["train", "val"]]'
    for values in ([0, 1], [0], [1]):
        text += len(values).to_bytes(8, "little") + np.array(values, "<i8").tobytes()
    rows = bytes([*range(0, 64, 2), *range(1, 64, 2)])
    assert content() == f"2 images, 2 classes, sha256 {hashlib.sha256(text + rows).hexdigest()[:16]}"
    assert content(parts=(("train", (0,)), ("val", (1,)))) == content(), "in any order"
    others = [
        content(names=("cat", "cow")),
        content(labels=(1, 0)),
        content(parts=(("train", (0, 1)), ("val", ()))),
        content(parts=(("train", (0,)), ("test", (1,)))),
        content(digests=bytes(64)),
    ]
    assert len({content(), *others}) == 6


@pytest.mark.parametrize("change", ["moved", "class is a link", "cache below"])
def test_place_and_names_of_images_do_not_count(change, pets, trial, tmp_path):
    first, root, changes = trial(pets), tmp_path / "moved", {}
    assert str(first.data.content).startswith("20 images, 2 classes, sha256 ")
    if change == "cache below":
        root, changes = pets, {"cache_dir": str(pets / "cache")}
        trial(root, **changes)
        assert (pets / "cache").is_dir()
    elif change == "class is a link":
        root.mkdir()
        for name in ("cat", "dog"):
            (root / name).symlink_to(pets / name)
    else:
        pets.rename(root)
        (root / "cat" / "9.bmp").rename(root / "cat" / "9b.bmp")  # still the last
    assert trial_id(trial(root, **changes)) == trial_id(first)


def link_to_another(pets: Path) -> None:
    shutil.rmtree(pets / "dog")
    (pets / "dog").symlink_to(pets / "cat")


def other_pixels(pets: Path) -> None:
    """Under the same name, with the same size and time."""
    path = pets / "cat" / "3.bmp"
    before = path.stat()
    paint(path, 77)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize(
    "change",
    [
        other_pixels,
        lambda pets: paint(pets / "cat" / "more.bmp", 5),
        lambda pets: (pets / "cat" / "9.bmp").unlink(),
        lambda pets: (pets / "cat" / "9.bmp").rename(pets / "dog" / "-1.bmp"),  # the files keep their order
        lambda pets: (pets / "dog").rename(pets / "dogs"),
        link_to_another,
    ],
    ids=["other pixels", "more", "fewer", "moved to the other class", "class renamed", "link to another class"],
)
def test_other_pixels_images_labels_or_classes(change, pets, trial):
    first = trial_id(trial(pets))
    change(pets)
    assert trial_id(trial(pets)) != first


def test_a_wanted_content(pets, trial):
    content = trial(pets).data.content
    assert trial(pets, content=content).data.content == content
    with pytest.raises(ConfigError, match=r"data\.content=7 images is asked for, but what is there has 20 images"):
        trial(pets, content="7 images")


def test_without_fetching_only_what_is_known_is_told(pets, trial, monkeypatch):
    """As a dry run wants it: nothing is read or downloaded."""
    monkeypatch.setattr(files, "_UNSETTLED", -(10**9))
    assert not is_identified(trial(pets, fetch=False))
    assert not (pets.parent / "cache").exists()
    content = trial(pets).data.content
    assert trial(pets, fetch=False).data.content == content


def test_what_was_read_before_a_stop_is_not_read_again(pets, tmp_path, monkeypatch):
    names, whole = sorted(str(path.relative_to(pets)) for path in pets.rglob("*.bmp")), Path.read_bytes
    read: list[Path] = []

    def reading(path: Path) -> bytes:
        read.append(path)
        if stops and path == pets / names[2]:
            raise KeyboardInterrupt
        return whole(path)

    monkeypatch.setattr(files, "_UNSETTLED", 0)
    monkeypatch.setattr(files, "_CHUNK", 1)
    monkeypatch.setattr(files, "_KEEP_EVERY", -1.0)
    monkeypatch.setattr(Path, "read_bytes", reading)
    stops = True
    with pytest.raises(KeyboardInterrupt):
        files.digests_of(pets, names, tmp_path / "cache")
    stops = False
    read.clear()
    files.digests_of(pets, names, tmp_path / "cache")
    assert sorted(read) == [pets / name for name in names[2:]]


@pytest.mark.parametrize("name", ["tiny_imagenet", "cifar10", "cifar100"])
def test_without_fetching_nothing_is_downloaded(name, trial, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("asked the network"))
    assert not is_identified(trial(tmp_path / "none", fetch=False, name=name))
    assert not list(tmp_path.iterdir())


def test_a_user_without_a_home_is_told(pets, trial, monkeypatch):
    """And gets no folder that is called ~."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(ConfigError, match=r"data\.cache_dir=~/x: no home folder .* another folder or set HOME"):
        trial(pets, cache_dir="~/x")
