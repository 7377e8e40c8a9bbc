"""A user's own folders: what is read, what is left aside, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plain_trials import PLAIN

from lora_vit.config import DataConfig
from lora_vit.data import cache, folder
from lora_vit.data.dataset import ImageData, forget, load_data
from lora_vit.errors import ConfigError


def paint(path: Path, shade: int) -> None:
    """A plain picture whose grey level tells which it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (shade, shade, shade)).save(path)


def load(tmp_path: Path, **changes) -> ImageData:
    values = PLAIN["data"] | {
        "name": "imagefolder",
        "root": str(tmp_path / "pets"),
        "batch_size": 1,
        "cache_size": 8,
        "cache_dir": str(tmp_path / "cache"),
    }
    forget()
    return load_data(DataConfig(**{**values, **changes}), quiet=True)


@pytest.fixture
def parts(tmp_path) -> Path:
    """train/, val/ and test/ with 5, 2 and 3 images of each of two classes; grey levels 0, 1, 2 ... in that order."""
    root = tmp_path / "pets"
    shade = 0
    for part, count in (("train", 5), ("val", 2), ("test", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                paint(root / part / name / f"{i}.png", shade)
                shade += 1
    return root


def test_given_parts_are_used_as_they_are(parts, tmp_path):
    data = load(tmp_path)
    assert data.images[:, 0, 4, 4].tolist() == list(range(20))
    assert data.splits["train"].tolist() == list(range(10))
    assert data.splits["val"].tolist() == list(range(10, 14))
    assert data.splits["test"].tolist() == list(range(14, 20))
    assert data.labels.tolist() == [0] * 5 + [1] * 5 + [0] * 2 + [1] * 2 + [0] * 3 + [1] * 3


def test_given_parts_need_no_fractions(parts, tmp_path):
    data = load(tmp_path, val_fraction=None, test_fraction=None)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 10, "val": 4, "test": 6}


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_part_without_folder_and_fraction(part, parts, tmp_path):
    (parts / part).rename(parts / f"unused_{part}")
    with pytest.raises(ConfigError, match=rf"no {part}/ and data\.{part}_fraction is null"):
        load(tmp_path, val_fraction=None, test_fraction=None)


def test_a_missing_part_comes_out_of_train_alone(parts, tmp_path):
    (parts / "test").rename(tmp_path / "away")
    data = load(tmp_path)
    assert set(data.splits["test"]) | set(data.splits["train"]) == set(range(10))
    assert not set(data.splits["test"]) & set(data.splits["train"])
    assert data.splits["val"].tolist() == list(range(10, 14))


def test_a_part_may_lack_a_class(parts, tmp_path):
    for path in (parts / "val" / "dog").iterdir():
        path.unlink()
    (parts / "val" / "dog").rmdir()
    assert load(tmp_path).labels[load(tmp_path).splits["val"]].tolist() == [0, 0]


def test_a_part_whose_images_are_not_sorted_by_class(parts, tmp_path):
    """As the test folder of ImageNet is published."""
    for i, path in enumerate(sorted((parts / "test").rglob("*.png"))):
        path.rename(parts / "test" / f"{i}.png")
    with pytest.raises(ConfigError, match="sort its images by class"):
        load(tmp_path)


def test_what_is_no_image_or_hidden_is_left_aside(parts, tmp_path):
    before = load(tmp_path)
    (parts / "train" / ".git").mkdir()
    (parts / "train" / "README.md").write_text("x")
    (parts / "train" / "cat" / "Thumbs.db").write_text("x")
    (parts / "train" / "cat" / "._0.png").write_text("x")
    assert load(tmp_path).fingerprint == before.fingerprint


def test_endings_in_capitals_count(parts, tmp_path):
    for i, ending in enumerate(("JPG", "JPEG", "Png", "BMP", "WebP", "GIF", "TIF", "tiff", "PPM")):
        paint(parts / "train" / "cat" / f"more{i}.{ending}", 200)
    assert len(load(tmp_path).splits["train"]) == 19


def test_fingerprint_follows_files_and_splits_not_the_place(parts, tmp_path):
    first = load(tmp_path).fingerprint
    parts.rename(tmp_path / "moved")
    assert load(tmp_path, root=str(tmp_path / "moved")).fingerprint == first
    (tmp_path / "moved" / "train" / "cat" / "4.png").unlink()
    assert load(tmp_path, root=str(tmp_path / "moved")).fingerprint != first


def test_train_per_class_leaves_val_and_test_alone(parts, tmp_path):
    data = load(tmp_path, train_per_class=2)
    assert np.bincount(data.labels[data.splits["train"]]).tolist() == [2, 2]
    assert len(data.splits["val"]) == 4


def test_classes_alone(tmp_path):
    """No parts: class folders directly below the root, split by fractions within each class."""
    for c, name in enumerate(("a", "b", "c")):
        for i in range(10):
            paint(tmp_path / "pets" / name / f"{i}.png", 10 * c + i)
    data = load(tmp_path)
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        assert np.bincount(data.labels[data.splits[split]]).tolist() == [count] * 3
    assert sorted(np.concatenate(list(data.splits.values())).tolist()) == list(range(30))
    assert load(tmp_path, split_seed=1).splits["val"].tolist() != data.splits["val"].tolist()


def test_one_class_is_named(tmp_path):
    paint(tmp_path / "pets" / "cat" / "0.png", 1)
    with pytest.raises(ConfigError, match=r"one class folder \(cat\)"):
        load(tmp_path)


def test_a_class_too_small_to_split(tmp_path):
    for name, count in (("cat", 5), ("dog", 2)):
        for i in range(count):
            paint(tmp_path / "pets" / name / f"{i}.png", i)
    with pytest.raises(ConfigError, match="'dog' has 2 images"):
        load(tmp_path)


def test_a_broken_image_is_named_with_its_folder(parts, tmp_path):
    (parts / "val" / "dog" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(ConfigError, match=r"1 broken image below .*val/dog/1\.png"):
        load(tmp_path)


# --- what cannot be used, word by word


def refused(tmp_path: Path, **changes) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **changes)
    return str(caught.value)


def test_a_root_that_is_no_folder(tmp_path):
    (tmp_path / "pets").write_text("x")
    assert refused(tmp_path) == (
        f"data.root={tmp_path}/pets is not a folder: give the folder that holds your class folders"
    )


@pytest.mark.parametrize("below", [".", "train"])
def test_a_class_without_images_is_named(below, tmp_path):
    for name in ("cat", "dog"):
        for i in range(5):
            paint(tmp_path / "pets" / below / name / f"{i}.png", i)
    (tmp_path / "pets" / below / "bird").mkdir()
    place = (tmp_path / "pets" / below / "bird").resolve()
    assert refused(tmp_path) == f"class folder {place} holds nothing that Pillow opens: fill or remove it"


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_part_without_any_class(part, parts, tmp_path):
    for path in sorted((parts / part).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert refused(tmp_path) == (
        f"{parts}/{part} holds no images in class folders: sort its images by class, or rename it"
    )


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_class_that_train_lacks(part, parts, tmp_path):
    for name in ("emu", "bird"):
        paint(parts / part / name / "0.png", 1)
    assert refused(tmp_path) == (
        f"{parts}/{part} has the class 'bird', which {parts}/train has not: take it away, or add it there"
    )


def test_two_folders_of_one_part(parts, tmp_path):
    (parts / "training").mkdir()
    assert refused(tmp_path) == f"{parts} has train/ and training/: keep one of them"
    (parts / "training").rmdir()
    (parts / "valid").mkdir()
    (parts / "validation").mkdir()
    assert refused(tmp_path) == f"{parts} has val/ and valid/ and validation/: keep one of them"


def test_no_class_and_one_class(tmp_path):
    needs = "a classifier needs two or more, each with its images"
    (tmp_path / "pets").mkdir()
    assert refused(tmp_path) == f"{tmp_path}/pets holds no class folders: {needs}"
    (tmp_path / "pets" / "inner" / "cat").mkdir(parents=True)
    assert refused(tmp_path) == f"{tmp_path}/pets holds one class folder (inner): {needs}"
    (tmp_path / "pets" / "inner" / "dog").mkdir()
    assert refused(tmp_path) == (
        f"{tmp_path}/pets holds one class folder (inner): {needs}; did you mean data.root={tmp_path}/pets/inner?"
    )


def test_folders_beside_the_parts_are_told(parts, tmp_path):
    for name in ("unlabelled", "more"):
        (parts / name).mkdir()
    assert load(tmp_path).passed_over == ("2 folders beside train/ (more, unlabelled)",)


def test_parts_in_capitals(parts, tmp_path):
    names = load(tmp_path).class_names
    for part in ("train", "val", "test"):
        (parts / part).rename(parts / part.capitalize())
    data = load(tmp_path)
    assert (data.class_names, {k: len(v) for k, v in data.splits.items()}) == (
        names,
        {"train": 10, "val": 4, "test": 6},
    )


@pytest.mark.parametrize(
    ("folders", "told"),
    [
        (("training_set/cat", "training_set/dog", "test_set/cat", "test_set/dog"), "test_set and training_set in "),
        (("seg_train/seg_train/cat", "seg_test/seg_test/cat"), "seg_test and seg_train in "),
        (("cat/train", "cat/test", "dog/train", "dog/test"), "cat/test and cat/train in "),
        (("cat", "dog", "test/cat", "test/dog"), "has test/ but no train/"),
        (("cat", "dog", "Test"), "has Test/ but no train/"),
    ],
)
def test_a_part_is_not_taken_for_a_class(folders, told, tmp_path):
    for folder_name in folders:
        for i in range(5):
            paint(tmp_path / "pets" / folder_name / f"{i}.png", i)
    assert told in refused(tmp_path)


def test_classes_whose_names_have_such_words_in_them(tmp_path):
    for name in ("test tube", "valley/deep", "latest/old", "train station/platform", "vehicle/bus", "vehicle/train"):
        for i in range(5):
            paint(tmp_path / "pets" / name / f"{i}.png", i)
    assert load(tmp_path).class_names == ["latest", "test tube", "train station", "valley", "vehicle"]


def test_labels_and_names(parts, tmp_path):
    data = load(tmp_path)
    assert data.class_names == ["cat", "dog"]
    assert data.labels.dtype == np.int64
    assert data.images.shape == (20, 3, 8, 8)


@pytest.mark.parametrize("quiet", [True, False])
def test_it_is_as_quiet_as_it_is_told_to_be(quiet, parts, tmp_path, monkeypatch):
    heard = []
    for name, place in (("digests_of", 3), ("decoded", 5)):
        whole = getattr(cache, name)
        monkeypatch.setattr(cache, name, lambda *a, whole=whole, place=place: heard.append(a[place]) or whole(*a))
    found = folder.find("imagefolder", str(parts), str(tmp_path / "cache"), quiet, False, True)
    images, value_range, _ = found.decode(8)
    assert (heard, images.shape, value_range) == ([quiet] * 2, (20, 3, 8, 8), None)
    assert found.decode(None)[0].shape == (20, 3, 10, 12)
    assert list(found.parts) == ["train", "val", "test"]
