"""What a data set says of itself, the table of all, and when they are listed again."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pictures import data_config, fresh, paint

from lora_vit.config import DATASETS
from lora_vit.data.dataset import ImageData, forget, known_content, load_data
from lora_vit.data.preprocessing import Decoding
from lora_vit.errors import ConfigError


def image_data(**changes: Any) -> ImageData:
    """2,010 images of 2 classes, 30 x 20 pixels."""
    splits = {"train": np.arange(2000), "val": np.arange(2000, 2004), "test": np.arange(2004, 2010)}
    values: dict[str, Any] = {
        **{"parts": {}, "content": "", "decode": None},
        "images": np.zeros((1, 3, 20, 30), np.uint8),
        "labels": np.arange(2010) % 2,
        "class_names": ["cat", "dog"],
        "splits": splits,
        "fingerprint": "f00d",
        "decoding": Decoding(None),
    }
    return ImageData(**{**values, **changes})


def digests(*copies: tuple[int, int]) -> np.ndarray:
    """Of 2,010 files that all differ but for some, each a copy of another."""
    found = np.random.default_rng(0).integers(0, 256, (2010, 32), dtype=np.uint8)
    for one, other in copies:
        found[one] = found[other]
    return found


def test_what_a_record_says_of_the_data():
    assert image_data().card() == {"fingerprint": "f00d", "classes": 2, "train": 2000, "val": 4, "test": 6}


@pytest.mark.parametrize(
    ("changes", "size", "told"),
    [
        ({"labels": np.arange(2500) % 2}, 20,
         "; 490 training images left out by data.train_per_class or data.train_examples"),
        ({}, 20, ""),
        ({}, 21, "; 30x20 px, enlarged to 21 px"),
        ({"images": np.zeros((1, 3, 30, 20))}, 21, "; 20x30 px, enlarged to 21 px"),
        ({"digests": digests((2001, 7), (2003, 9), (5, 7))}, 8, "; 2 images of val are in train too"),
        ({"groups": np.arange(2010) % 2002}, 8, "; 2 images of val are of groups in train too"
         "; 6 images of test are of groups in train too"),
        ({"digests": digests((0, 1), (3, 2001))}, 8,
         "; 1 images of val are in train too; 1 images lie in two classes (cat and dog)"),
        ({"decoding": Decoding(8, (0.5, 4095.0)), "told": ("1,200 files do", "1 not"),
          "passed_over": ("1 x (a)", "2 y (b)")}, 8,
         "; values 0.5 .. 4095 scaled to 0 .. 255; 1,200 files do; 1 not"
         "; passed over: 1 x (a), 2 y (b)"),
    ],
)  # fmt: skip
def test_the_line_of_a_data_set(changes, size, told):
    start = "data: 2,010 images of 2 classes (cat, dog): train 2,000, val 4, test 6; one of 4 val images is 25 points"
    assert image_data(**changes).line(size) == start + told
    labels = (np.arange(2010) % 4 == 0).astype(int)
    few = image_data(labels=labels)
    assert few.line(20, "accuracy") == image_data().line(20), "503 and 1,507: not three times as many"
    labels[0] = 0
    few = image_data(labels=labels)
    told = "; 502 to 1,508 images in a class: try trainer.metric=balanced_accuracy"
    assert few.line(20, "accuracy") == image_data().line(20) + told
    assert few.line(20, "macro_f1") == image_data().line(20)
    untested = image_data(splits={"train": np.arange(1610), "val": np.arange(1610, 2010)})
    assert untested.line(8).endswith("train 1,610, val 400; no test part: nothing is tested")
    assert "of 1,000 classes (x, x, x, ...): train" in image_data(class_names=["x"] * 1000).line(8)


def test_each_data_set_has_a_loader_and_a_preset(project_root):
    presets = [yaml.safe_load(path.read_text()) for path in (project_root / "conf" / "data").glob("*.yaml")]
    assert {preset["name"] for preset in presets if "name" in preset} == set(DATASETS)
    for known in DATASETS.values():
        assert callable(import_module(f"lora_vit.data.{known.loader}").find)


@pytest.fixture
def pets(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("cat", "dog"):
        for i in range(5):
            paint(tmp_path / "pets" / name / f"{i}.png", i)
    return tmp_path / "pets"


def test_loading_in_the_home_folder(pets, tmp_path, capsys):
    config = data_config(tmp_path, root="~/pets", cache_dir="~/cache", content=fresh(data_config(tmp_path)).content)
    forget()
    assert load_data(config).images.shape == (10, 3, 8, 8)
    assert (tmp_path / "cache").is_dir()
    forget()
    assert load_data(data_config(tmp_path, cache_size=16)).images.shape == (10, 3, 16, 16)
    assert capsys.readouterr().out.startswith("decoding images: 10 images")
    config.content = "7 images"
    with pytest.raises(ConfigError, match=r"data\.root=~/pets holds other images.*: 10 images, .*, not 7 images"):
        load_data(config)


def test_files_are_listed_once_for_each_place_and_way(pets, tmp_path):
    first = fresh(data_config(tmp_path)).content
    paint(pets / "cat" / "more.png")
    for same in ({"cache_size": 16}, {"split_seed": 3}, {"batch_size": 2}, {"augment": "crop_flip"}):
        assert known_content(data_config(tmp_path, **same)) == first, same
    for other in ({"root": str(pets / ".." / "pets")}, {"official_val": True}, {"cache_dir": str(tmp_path / "else")}):
        assert known_content(data_config(tmp_path, **other)) not in (first, None), other
    assert known_content(data_config(tmp_path), fetch=False) == first
    assert fresh(data_config(tmp_path)).content != first


def test_what_a_package_brings_is_known_by_its_version(tmp_path):
    """The made-up images stay what they are."""
    assert [known_content(data_config(tmp_path, name)) for name in ("digits", "fake")] == [None, None]
    for size in (8, 16, 8):
        assert load_data(data_config(tmp_path, "fake", root=None, cache_size=size)).images.shape == (100, 3, size, size)
    of_32_pixels = fresh(data_config(tmp_path, "fake", root=None))
    assert of_32_pixels.content == "100 images, 4 classes, sha256 1387b3eb7a1155bb"


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    data = fresh(data_config(tmp_path, "digits", root=None, train_per_class=10, val_fraction=0.4, test_fraction=0.4))
    assert data.images.shape == (1797, 3, 8, 8)
    assert len(data.splits["train"]) == 100
    assert min(len(data.splits["val"]), len(data.splits["test"])) >= 700
    assert (data.images.dtype, int(data.images.max())) == (np.uint8, 255)
    assert (data.labels == load_digits().target).all()
