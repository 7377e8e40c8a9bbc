"""A user's own folders: which are classes and parts, what is left aside, what is refused."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from pictures import data_config, fresh, paint, refused, shades
from PIL import Image

from lora_vit.data.dataset import ImageData
from lora_vit.data.preprocessing import Decoding

SIZES = {"train": 10, "val": 4, "test": 6}


def load(tmp_path: Path, **changes) -> ImageData:
    return fresh(data_config(tmp_path, **{"cache_size": 8, **changes}))


def sizes(data: ImageData) -> dict[str, int]:
    return {name: len(ids) for name, ids in data.splits.items()}


def fill(root: Path, *folders: str, count: int = 5, first: int = 0) -> Path:
    """So many images in each folder, of grey levels that go on from folder to folder."""
    for i, name in enumerate(folders):
        for j in range(count):
            paint(root / name / f"{j}.png", first + count * i + j, (12, 10))
    return root


@pytest.fixture
def parts(tmp_path) -> Path:
    """train/, val/ and test/ with 5, 2 and 3 images of each of two classes; grey levels 0, 1, 2 ... in that order."""
    for part, count, first in (("train", 5, 0), ("val", 2, 10), ("test", 3, 14)):
        fill(tmp_path / "pets" / part, "cat", "dog", count=count, first=first)
    return tmp_path / "pets"


def test_given_parts_are_used_as_they_are(parts, tmp_path):
    data = load(tmp_path)
    assert shades(data) == list(range(20))
    assert {name: ids.tolist() for name, ids in data.splits.items()} == {
        "train": list(range(10)), "val": list(range(10, 14)), "test": list(range(14, 20)),
    }  # fmt: skip
    assert data.labels.tolist() == [0] * 5 + [1] * 5 + [0] * 2 + [1] * 2 + [0] * 3 + [1] * 3
    assert (data.class_names, data.labels.dtype) == (["cat", "dog"], np.int64)
    assert sizes(load(tmp_path, val_fraction=None, test_fraction=None)) == SIZES
    own = load(tmp_path, cache_size=None)
    assert (own.images.shape, own.decoding) == ((20, 3, 10, 12), Decoding(None)), "not square: they are squashed"
    assert load(tmp_path, cache_size=8, background=[1, 2, 3]).decoding == Decoding(8, None, (1, 2, 3))


def test_a_class_that_a_part_lacks_is_told(parts, tmp_path):
    """The figure is of the other ones."""
    (parts / "val/dog").rename(tmp_path / "away")
    data = load(tmp_path)
    assert sizes(data)["val"] == 2
    assert "; classes without val images: 1 (as dog)" in data.line(8)


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_missing_part_comes_out_of_train_alone(part, parts, tmp_path):
    other = {"val": "test", "test": "val"}[part]
    (parts / part).rename(tmp_path / "away")
    data = load(tmp_path, train_per_class=2)
    assert sizes(data) == {part: 2, other: SIZES[other], "train": 4}
    assert np.bincount(data.labels[data.splits["train"]]).tolist() == [2, 2]
    assert set(data.splits[part]) | set(data.splits["train"]) < set(range(10))
    fractions = {"val_fraction": None, "test_fraction": None}
    if part == "val":
        assert "no val/ and data.val_fraction is null" in refused(load, tmp_path, **fractions)
    else:
        assert sizes(load(tmp_path, **fractions)) == {"val": 4, "train": 10}


@pytest.mark.parametrize(
    ("named", "part"),
    [("valid", "val"), ("validation", "val"), ("testing", "test"), ("TEST", "test"), ("Training", "train")],
)
def test_parts_by_other_names(named, part, parts, tmp_path):
    first = load(tmp_path)
    (parts / part).rename(parts / named)
    data = load(tmp_path)
    assert (data.fingerprint, sizes(data)) == (first.fingerprint, SIZES)
    shutil.copytree(parts / named, parts / part, dirs_exist_ok=True)
    assert f"{parts} has {min(named, part)}/ and {max(named, part)}/: keep one of them" in refused(load, tmp_path)


def test_a_part_may_lack_a_class(parts, tmp_path):
    shutil.rmtree(parts / "val" / "dog")
    data = load(tmp_path)
    assert data.labels[data.splits["val"]].tolist() == [0, 0]


def test_what_decoding_found_is_in_the_line(tmp_path):
    fill(tmp_path / "pets", "cat", "dog")
    Image.fromarray(np.array([[7, 65535]], np.uint16)).save(tmp_path / "pets" / "cat" / "deep.png")
    pages = [Image.new("L", (8, 8), shade) for shade in (10, 200)]
    pages[0].save(tmp_path / "pets" / "dog" / "pages.gif", save_all=True, append_images=pages[1:])
    for name, alpha in (("clear", 254), ("opaque", 255)):
        Image.new("LA", (8, 8), (7, alpha)).save(tmp_path / "pets" / "dog" / f"{name}.png")
    for _ in range(2):
        assert load(tmp_path).line(8).endswith(
            "; values 0 .. 65535 scaled to 0 .. 255; 1 file with more than 8 bits; "
            "1 file with several pictures: the first is used; 1 file with transparent pixels"
        )


@pytest.mark.parametrize("shades", [(0, 0), (9, 11)])
def test_pictures_in_which_nothing_is_to_be_seen(shades, tmp_path):
    fill(tmp_path / "pets", "cat", "dog", count=5, first=shades[0])
    for i, path in enumerate(sorted((tmp_path / "pets").rglob("*.png"))):
        paint(path, shades[i % 2], (12, 10))
    message = refused(load, tmp_path)
    assert f"every pixel of the images of data.root={tmp_path}/pets becomes about " in message
    assert any(f" {shade} of 0 .. 255" in message for shade in shades)


def test_what_lies_at_each_level_is_left_aside_with_a_word(parts, tmp_path):
    """At the top, in a part and in a class."""
    before = load(tmp_path)
    places = ("more/0.png", "unlabelled/0.png", "outputs/sweeps/0.png", "train/run/0.png", "train/loose.png")
    for name in (*places, "train/dog/.hidden/0.png"):
        paint(parts / name)
    for name in ("sweep.json", "train/run/record.json", "train/cat/Thumbs.db"):
        (parts / name).write_text("x")
    data = load(tmp_path)
    assert data.fingerprint == before.fingerprint
    assert set(data.passed_over) == {
        "2 folders beside train/ (more, unlabelled)", "2 no images (sweep.json, train/cat/Thumbs.db)",
        "1 image outside the class folders (loose.png)", "2 of lora_vit's own (outputs, run)",
        "1 hidden (train/dog/.hidden)",
    }  # fmt: skip


def test_names_that_are_not_text(tmp_path):
    """Latin-1 in a file's and in a class's name; those that are text stay as they are."""
    fill(tmp_path / "pets", "chèvre", os.fsdecode(b"ch\xe8vre"), "dog")
    (tmp_path / "pets" / "dog" / "3.png").rename(tmp_path / "pets" / "dog" / os.fsdecode(b"3caf\xe9.png"))
    data = load(tmp_path)
    assert (data.class_names, len(data.images)) == (["chèvre", "ch\\xe8vre", "dog"], 15)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ((), "{} holds no class folders: a classifier needs two or more, each with its images"),
        (("inner",), "{} holds one class folder (inner): a classifier needs two or more, each with its images"),
        (("inner/cat", "inner/dog"), "each with its images: give the folder that holds them"),
        (("Data/CLS/train/a", "-Annotations/CLS/train", "-Sets"), "Annotations holds no image that Pillow can open: "
         "fill or remove it"),
        (("cat", "dog", "-bird"), "class folder {}/bird holds no image that Pillow can open: fill or remove it"),
        (("train/cat", "train/dog", "-train/bird"), "class folder {}/train/bird holds no image that Pillow can open"),
        (("train/cat", "train/dog", "-val"), "{}/val holds no images in class folders: sort"),
        (("train/cat", "train/dog", "test/more"), "{}/test has the class 'more', which train/ lacks"),
        (("train/cat", "train/dog", "val/emu", "val/bird"), "{}/val has the class 'bird', which train/ lacks"),
        (("train/cat", "train/dog", "valid", "validation"), "{} has valid/ and validation/: keep one of them"),
        (("training_set/cat", "training_set/dog", "test_set/cat", "test_set/dog"), "test_set, training_set in {} look"),
        (("seg_train/seg_train/cat", "seg_test/seg_test/cat"), "seg_test, seg_train in {} look like splits"),
        (("cat/train", "cat/test", "dog/train", "dog/test"), "cat/test, cat/train in {} look like splits, not like "
         "classes: give a folder for each class, or train/, val/ and test/ with these (links will do)"),
        (("train_images/a", "train_images/b", "test_images"), "test_images, train_images in {} look like splits, not "
         "like classes: give a folder for each class, or train/, val/ and test/ with these (links will do)"),
        (("train_images", "test_images"), "test_images, train_images in {} look like splits"),
        (("dev/a", "dev/b", "eval/a", "eval/b"), "dev, eval in {} look like splits"),
        (("train_1", "train_2"), "train_1, train_2 in {} look like numbered parts"),
        (("fold_0/a", "fold_0/b", "fold_1/a", "fold_1/b"), "fold_0, fold_1 in {} look like numbered parts, not like "
         "classes: give a folder for each class"),
        (("HAM_images_part_1", "HAM_images_part_2"), "HAM_images_part_1, HAM_images_part_2 in {} look like numbered"),
        (("images_001/images", "images_002/images", "images_003/images", "images_012/images"),
         "images_001, images_002, images_003, ... in {} look like numbered parts"),
        (("images", "annotations"), "annotations, images in {} look like images and their annotations"),
        (("train/images", "-train/labels", "-val/images"), "images, labels in {}/train look like images and their"),
        (("color/a", "color/b", "grayscale/a", "grayscale/b"), "color, grayscale in {} look like variants of one set, "
         "not like classes: give a"),
        (("cat", "dog", "cells/cat", "cells/dog"), "cells/cat, cells/dog in {} look like a copy, not like classes"),
        (("cat", "dog", "test/cat", "test/dog"), "{} has test/ but no train/: add it, or rename the class"),
        (("cat", "dog", "Test"), "{} has Test/ but no train/"),
    ],
)
def test_folders_that_cannot_be_used(folders, message, tmp_path):
    """Those with a dash are empty."""
    root = tmp_path / "pets"
    root.mkdir()
    fill(root, *(name for name in folders if not name.startswith("-")))
    for name in folders:
        (root / name.removeprefix("-")).mkdir(parents=True, exist_ok=True)
    assert message.replace("{}", str(root)) in refused(load, tmp_path)


def test_classes_whose_names_have_such_words_in_them(tmp_path):
    """And people that are in several classes."""
    names = ("test tube", "valley/deep", "latest/old", "train station/platform", "vehicle/bus", "vehicle/train")
    fill(tmp_path / "pets", *names, "with mask/anna", "with mask/ben", "grade_1/anna", "grade_1/ben", "images/x")
    assert load(tmp_path).class_names == [
        "grade_1", "images", "latest", "test tube", "train station", "valley", "vehicle", "with mask",
    ]  # fmt: skip


def test_what_lies_beside_images_and_cannot_be_taken_away_is_left_aside(parts, tmp_path):
    """On a mount that cannot be written: masks in a class, test images without classes, files without endings."""
    before = load(tmp_path).fingerprint
    shutil.rmtree(parts / "test")
    without_test = load(tmp_path).fingerprint
    assert without_test != before
    for part, name in (("train", "cat"), ("train", "dog"), ("val", "dog")):
        shutil.copytree(parts / part / name, parts / part / name / "images")
        for path in (parts / part / name).glob("*.png"):
            path.unlink()
        paint(parts / part / name / ("lung masks" if part == "val" else "masks") / "0.png")
    for name in ("1_mask", "1_mask_2"):
        paint(parts / "train/cat/images" / f"{name}.png")
    (parts / "train/dog/images/0.png").rename(parts / "train/dog/images/0")
    (parts / "train/dog/images/notes").write_text("x")
    paint(parts / "test" / "0.png")
    for name in ("train/labels.csv", "train/IMG.HEIC", "more.tar"):
        (parts / name).write_text("x")
    data = load(tmp_path)
    assert data.fingerprint == without_test
    assert set(data.passed_over) == {
        "1 folder beside train/ without classes (test)",
        "3 folders of masks or annotations (train/cat/masks, train/dog/masks, val/dog/lung masks)",
        "2 masks beside their images (train/cat/images/1_mask.png, train/cat/images/1_mask_2.png)",
        "3 no images (more.tar, labels.csv, train/dog/images/notes)",
        "1 of HEIC, read after pip install pillow-heif (IMG.HEIC)",
    }  # fmt: skip
    assert sizes(load(tmp_path, test_fraction=None)) == {"val": 4, "train": 10}
    root = str(parts / "train")
    assert "2 parts beside train/, used with the folder of all as data.root (test, val)" in load(
        tmp_path, root=root
    ).passed_over


def test_both_unicode_forms_of_a_name_are_one_class(parts, tmp_path):
    for part, form in (("train", "NFC"), ("val", "NFD"), ("test", "NFD")):
        (parts / part / "cat").rename(parts / part / unicodedata.normalize(form, "café"))
    before = load(tmp_path)
    assert before.class_names == ["café", "dog"]
    paint(parts / "train" / unicodedata.normalize("NFD", "café") / "0.png", 90)
    assert sizes(load(tmp_path)) == {**SIZES, "train": 11}


def test_other_things_that_cannot_be_used(tmp_path):
    (tmp_path / "pets").write_text("x")
    assert f"data.root={tmp_path}/pets is not a folder: give the folder that holds" in refused(load, tmp_path)
    assert "data.root has no value" in refused(load, tmp_path, root=None)
    (tmp_path / "pets").unlink()
    paint(tmp_path / "pets/0.png")
    (tmp_path / "pets/labels.parquet").write_text("x")
    aside = "1 image outside the class folders (0.png), 1 no images (labels.parquet)"
    assert f"pets holds no class folders, {aside}: a classifier needs" in refused(load, tmp_path)
    shutil.rmtree(tmp_path / "pets")
    fill(tmp_path / "pets", "cat", "dog")
    (tmp_path / "pets/dog/1.png").write_bytes(b"not a picture")
    assert f"1 broken image below {tmp_path}/pets: dog/1.png" in refused(load, tmp_path)
    for i in (1, 2, 3):
        (tmp_path / f"pets/dog/{i}.png").unlink()
    assert "'dog' has 2 images" in refused(load, tmp_path)


@pytest.mark.parametrize("name", ["", "cat"])
def test_a_folder_that_may_not_be_read_is_named(name, parts, tmp_path, monkeypatch):
    """Not as an output folder that cannot be written, which is what an OSError means in training."""
    listed = os.scandir

    def forbidden(path):
        if Path(path) == parts / "train" / name:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    assert f"{parts}/train/{name} cannot be read (Permission denied): repair or remove it" in refused(load, tmp_path)
