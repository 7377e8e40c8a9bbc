"""Which data a figure belongs to: what the files contain, and nothing else."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import trial_config
from hydra import compose, initialize_config_module
from PIL import Image

from lora_vit.compose import register_schema
from lora_vit.config import trial_id
from lora_vit.data import files
from lora_vit.data.dataset import ImageData, content_of, forget, load_data
from lora_vit.errors import ConfigError


def paint(path: Path, shade: int) -> Path:
    """A plain 8x8 picture; all have the same size on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(path.with_suffix(".bmp"))
    return path.with_suffix(".bmp")


@pytest.fixture
def pets(tmp_path) -> Path:
    """Two classes of ten images."""
    for c, name in enumerate(("cat", "dog")):
        for i in range(10):
            paint(tmp_path / "pets" / name / f"{i}.bmp", 100 * c + i)
    return tmp_path / "pets"


@pytest.fixture
def trial(tmp_path):
    """Composes a trial on a folder as a command would: the files are looked at anew."""

    def composed(root: Path, *overrides: str):
        forget()
        data = ("data=imagefolder", f"data.root='{root}'", f"data.cache_dir={tmp_path / 'cache'}", "data.cache_size=8")
        return trial_config(*data, "data.batch_size=2", "data.augment=none", *overrides)

    return composed


def loaded(config) -> ImageData:
    forget()
    return load_data(config.data, quiet=True)


def test_the_words_are_a_digest_of_classes_labels_parts_and_files():
    """Spelt out: another one would make every recorded trial another."""
    parts = {"val": np.array([1]), "train": np.array([0])}
    digests = np.arange(64, dtype=np.uint8).reshape(2, 32)
    text = b'[["cat", "dog"], ["train", "val"]]'
    for values in ([0, 1], [0], [1]):
        text += len(values).to_bytes(8, "little") + np.array(values, "<i8").tobytes()
    expected = hashlib.sha256(text + bytes(range(64))).hexdigest()[:16]
    assert content_of(["cat", "dog"], np.array([0, 1]), parts, digests) == f"2 images, 2 classes, sha256 {expected}"


def test_place_and_names_do_not_count(pets, trial, tmp_path):
    first = trial(pets)
    assert first.data.content is not None
    assert first.data.content.startswith("20 images, 2 classes, sha256 ")
    pets.rename(tmp_path / "moved")
    (tmp_path / "moved" / "cat" / "9.bmp").rename(tmp_path / "moved" / "cat" / "9b.bmp")  # still the last
    assert trial_id(trial(tmp_path / "moved")) == trial_id(first)


@pytest.mark.parametrize("times", ["as they come", "as they were"])
def test_other_pixels_under_the_same_names_and_sizes(times, pets, trial):
    first = trial(pets)
    before = loaded(first)
    path = pets / "cat" / "3.bmp"
    stat = path.stat()
    paint(path, 77)
    assert path.stat().st_size == stat.st_size
    if times == "as they were":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = trial(pets)
    assert trial_id(second) != trial_id(first)
    after = loaded(second)
    assert after.images[3, 0, 0, 0] == 77
    assert after.fingerprint != before.fingerprint
    with pytest.raises(ConfigError, match="holds other images, labels or class names than asked for: 20 images"):
        loaded(first)


def test_a_folder_replaced_by_another_of_the_same_names_sizes_and_times(pets, trial, tmp_path):
    """Two roots whose files agree in name, size and time are two data sets."""
    twin = tmp_path / "twin"
    shutil.copytree(pets, twin)
    for path in sorted(twin.rglob("*.bmp")):
        stat = (pets / path.relative_to(twin)).stat()
        paint(path, 255 - int(path.stem))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    one, other = trial(pets), trial(twin)
    assert trial_id(one) != trial_id(other)
    assert loaded(one).images[0, 0, 0, 0] == 0
    assert loaded(other).images[0, 0, 0, 0] == 255


@pytest.mark.parametrize("change", ["more", "fewer", "moved to the other class", "class renamed", "given a part"])
def test_other_images_labels_classes_or_parts(change, pets, trial):
    first = trial_id(trial(pets))
    if change == "more":
        paint(pets / "cat" / "more.bmp", 5)
    elif change == "fewer":
        (pets / "cat" / "9.bmp").unlink()
    elif change == "moved to the other class":
        (pets / "cat" / "9.bmp").rename(pets / "dog" / "-1.bmp")  # the files keep their order
    elif change == "class renamed":
        (pets / "dog").rename(pets / "dogs")
    else:
        (pets / "train").mkdir()
        for name in ("cat", "dog"):
            (pets / name).rename(pets / "train" / name)
        first = trial_id(trial(pets))
        shutil.copytree(pets / "train", pets / "val")
    assert trial_id(trial(pets)) != first


def test_class_folders_that_are_links(pets, trial, tmp_path):
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(pets / name)
    assert trial_id(trial(tmp_path / "linked")) == trial_id(trial(pets))
    paint(pets / "cat" / "3.bmp", 99)
    assert trial_id(trial(tmp_path / "linked")) == trial_id(trial(pets))
    (tmp_path / "linked" / "dog").unlink()
    (tmp_path / "linked" / "dog").symlink_to(pets / "cat")
    assert trial_id(trial(tmp_path / "linked")) != trial_id(trial(pets))


def test_dirt_and_our_own_files_do_not_count(pets, trial, tmp_path):
    """And each is told."""
    first = trial(pets)
    (pets / ".DS_Store").write_bytes(b"x")
    (pets / "cat" / "Thumbs.db").write_bytes(b"x")
    (pets / "cat" / "gone.bmp").symlink_to(tmp_path / "nowhere")
    (pets / "cat" / "deeper").mkdir()
    (pets / "cat" / "deeper" / "back").symlink_to(pets / "cat")
    paint(pets / "outputs" / "sweeps" / "s" / "plot.bmp", 1)
    paint(pets / "run" / "plot.bmp", 1)
    (pets / "run" / "record.json").write_text("{}")
    paint(pets / "dog" / "trial" / "plot.bmp", 1)
    (pets / "dog" / "trial" / "checkpoint.pt").write_text("")
    paint(pets / "loose.bmp", 1)
    paint(pets / "summary" / "plot.bmp", 1)  # as of hydra.sweep.dir=pets
    (pets / "tensorboard").mkdir()
    (pets / "sweep.json").write_text("{}")
    second = trial(pets)
    assert trial_id(second) == trial_id(first)
    told = loaded(second).line(8)
    for part in (
        "1 hidden (.DS_Store)", "2 no images (sweep.json, cat/Thumbs.db)", "1 broken links (cat/gone.bmp)",
        "1 links that lead back (cat/deeper/back)", "5 of lora_vit's own (outputs, run, summary, ...)",
        "1 images outside the class folders (loose.bmp)",
    ):  # fmt: skip
        assert part in told, told
    assert told.startswith("data: 20 images of 2 classes: val 2, test 2, train 16; passed over: ")


def test_the_cache_below_the_images(pets, trial):
    first = trial(pets, f"data.cache_dir={pets / 'cache'}")
    data = loaded(first)
    assert (pets / "cache").is_dir()
    assert trial_id(trial(pets, f"data.cache_dir={pets / 'cache'}")) == trial_id(first)
    assert len(data.class_names) == 2


def test_sub_folders_and_all_formats_are_used(pets, trial):
    first = trial(pets)
    for i, ending in enumerate(("pgm", "jfif", "JP2", "avif", "tga", "pcx")):
        path = pets / "cat" / "more" / f"{i}.{ending}"
        path.parent.mkdir(exist_ok=True)
        if f".{ending.lower()}" not in files.image_endings():
            continue  # this Pillow was built without it
        Image.new("L", (8, 8), 200).save(path, "JPEG" if ending == "jfif" else None)
    count = sum(1 for _ in (pets / "cat" / "more").iterdir())
    assert count >= 5
    second = trial(pets)
    assert second.data.content is not None
    assert second.data.content.startswith(f"{20 + count} images, 2 classes")
    assert trial_id(second) != trial_id(first)
    assert len(loaded(second).images) == 20 + count


@pytest.mark.parametrize(("name", "part"), [("valid", "val"), ("validation", "val"), ("testing", "test")])
def test_other_names_of_parts(name, part, pets, trial):
    (pets / "training").mkdir()
    for c in ("cat", "dog"):
        (pets / c).rename(pets / "training" / c)
    shutil.copytree(pets / "training", pets / name)
    shutil.copytree(pets / "training", pets / "unlabelled")
    data = loaded(trial(pets))
    assert len(data.splits[part]) == 20
    assert "1 folders beside train/ (unlabelled)" in data.passed_over
    shutil.copytree(pets / name, pets / part)
    with pytest.raises(ConfigError, match=rf"has {part}/ and {name}/: keep one of them"):
        trial(pets)


def test_names_that_are_not_text(pets, trial):
    """Latin-1 in a file's and in a class's name."""
    (pets / "cat" / "3.bmp").rename(os.fsdecode(bytes(pets / "cat") + b"/3caf\xe9.bmp"))
    paint(pets / os.fsdecode(b"ch\xe8vre") / "0.bmp", 3)
    for i in range(1, 6):
        paint(pets / os.fsdecode(b"ch\xe8vre") / f"{i}.bmp", i)
    config = trial(pets)
    data = loaded(config)
    assert data.class_names == ["cat", "ch\\xe8vre", "dog"]
    assert data.class_names[1].encode("ascii")
    assert len(data.images) == 26
    assert trial_id(trial(pets)) == trial_id(config)


def test_one_level_off(pets, trial):
    (pets.parent / "above").mkdir()
    pets.rename(pets.parent / "above" / "pets")
    with pytest.raises(ConfigError, match=r"one class folder \(pets\).* did you mean data\.root=.*/pets\?"):
        trial(pets.parent / "above")


def test_files_are_read_once_and_again_only_where_they_changed(pets, trial, monkeypatch):
    monkeypatch.setattr(files, "_UNSETTLED", -(10**9))  # as if all were written long ago
    read: list[str] = []
    whole = files._sha256
    monkeypatch.setattr(files, "_sha256", lambda root, name: read.append(name) or whole(root, name))
    first = trial(pets)
    assert len(read) == 20
    trial(pets)
    load_data(first.data, True)
    assert len(read) == 20
    paint(pets / "dog" / "2.bmp", 3)
    trial(pets)
    assert read[20:] == ["dog/2.bmp"]
    for kept in (pets.parent / "cache").glob("files-*"):
        kept.write_bytes(kept.read_bytes()[:100])  # damaged
    assert trial_id(trial(pets)) != trial_id(first)
    assert len(read) == 41


def test_a_file_changed_a_moment_ago_is_read_again(pets, trial, monkeypatch):
    """It may change once more before the disk's clock moves on."""
    read: list[str] = []
    whole = files._sha256
    monkeypatch.setattr(files, "_sha256", lambda root, name: read.append(name) or whole(root, name))
    trial(pets)
    trial(pets)
    assert len(read) == 40


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", ["", "dog"])
def test_a_folder_that_may_not_be_read_is_told_as_such(name, named, pets, trial, monkeypatch):
    """Not as an output folder that cannot be written, which is what an OSError means in training."""
    listed = os.scandir

    def forbidden(path):
        if Path(path) == pets / name:
            raise PermissionError(13, "Permission denied", *[os.fspath(path)] * named)
        return listed(path)

    monkeypatch.setattr(files.os, "scandir", forbidden)
    with pytest.raises(
        ConfigError,
        match=rf"^{pets / name if named else pets}/? cannot be read \(Permission denied\): mend or remove it",
    ):
        trial(pets)


def test_images_that_are_in_train_too_are_counted(pets, trial):
    """A copy of the training folder as val/ would pass for an honest accuracy; so would copies within a class."""
    assert "in train too" not in loaded(trial(pets)).line(8)
    (pets / "train").mkdir()
    for name in ("cat", "dog"):
        (pets / name).rename(pets / "train" / name)
    shutil.copytree(pets / "train" / "cat", pets / "val" / "cat")
    paint(pets / "val" / "cat" / "new.bmp", 50)
    data = loaded(trial(pets))
    expected = np.isin(range(10), data.splits["train"]).sum()  # the others are in test
    assert f"; {expected} images of val are in train too" in data.line(8)
    assert "of test are" not in data.line(8)


def test_files_are_listed_once_for_many_trials(pets, trial, monkeypatch):
    listed = []
    whole = files.images_below
    monkeypatch.setattr("lora_vit.data.folder.images_below", lambda *a: listed.append(a[1]) or whole(*a))
    config = trial(pets)
    for seed in range(5):
        load_data(config.data, True)
        again = trial_config(
            "data=imagefolder", f"data.root='{pets}'", f"data.cache_dir={config.data.cache_dir}", f"seed={seed}"
        )
        assert again.data.content == config.data.content
    assert listed == ["cat", "dog"]


def test_a_wanted_content(pets, trial):
    content = trial(pets).data.content
    assert trial(pets, f"data.content='{content}'").data.content == content
    with pytest.raises(ValueError, match=r"data\.content=7 images is asked for, but what is there has 20 images"):
        trial(pets, "data.content='7 images'")


def test_a_cache_follows_the_models_size(pets, trial):
    def size(*overrides: str) -> int | None:
        register_schema()
        with initialize_config_module("lora_vit.conf", version_base="1.3"):
            composed = compose("config", overrides=["data=imagefolder", f"data.root={pets}", *overrides])
        return composed.data.cache_size

    assert size() == 256
    assert size("model.image_size=384") == 384
    assert size("model.image_size=384", "data.cache_size=128") == 128
    assert "8x8 px, enlarged to 16 px" in loaded(trial(pets)).line(16)
    assert "enlarged" not in loaded(trial(pets)).line(8)


def test_without_fetching_only_what_is_known_is_told(pets, trial, monkeypatch):
    """As a dry run wants it: nothing is read or downloaded."""
    monkeypatch.setattr(files, "_UNSETTLED", -(10**9))
    overrides = ("data=imagefolder", f"data.root='{pets}'", f"data.cache_dir={pets.parent / 'cache'}")
    forget()
    assert trial_config(*overrides, "sweep.dry_run=true").data.content is None
    assert not (pets.parent / "cache").exists()
    content = trial(pets).data.content
    forget()
    assert trial_config(*overrides, "sweep.dry_run=true").data.content == content


@pytest.mark.parametrize("name", ["tiny_imagenet", "cifar10", "cifar100"])
def test_without_fetching_nothing_is_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("asked the network"))
    overrides = [f"data={name}", f"data.root={tmp_path / 'none'}", f"data.cache_dir={tmp_path}", "sweep.dry_run=true"]
    cache_size = "data.cache_size=null"
    assert trial_config(*overrides, cache_size).data.content is None
