"""What a data set says of itself, and when its files are listed anew."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from plain_trials import PLAIN

from lora_vit.config import DataConfig
from lora_vit.data import dataset
from lora_vit.data.dataset import Found, ImageData, content_of, forget, known_content, load_data, shown
from lora_vit.data.splits import fingerprint
from lora_vit.errors import ConfigError


def image_data(**changes: Any) -> ImageData:
    """2,500 images of 2 classes, 30 x 20 pixels; 2,010 of them in use."""
    splits = {"train": np.arange(2000), "val": np.arange(4), "test": np.arange(6)}
    values: dict[str, Any] = {
        "images": np.zeros((1, 3, 20, 30), np.uint8),
        "labels": np.zeros(2500, np.int64),
        "class_names": ["cat", "dog"],
        "splits": splits,
        "fingerprint": "f00d",
    }
    return ImageData(**{**values, **changes})


def test_what_a_record_says_of_the_data():
    assert image_data().card() == {"fingerprint": "f00d", "classes": 2, "train": 2000, "val": 4, "test": 6}


def test_the_line_of_a_data_set():
    assert (image_data().passed_over, image_data().value_range) == ((), None)
    start = "data: 2,010 images of 2 classes: train 2,000, val 4, test 6"
    left = "; 490 training images left out by data.train_per_class"
    assert image_data().line(20) == start + left
    assert image_data(labels=np.zeros(2010)).line(20) == start
    assert image_data(labels=np.zeros(2011)).line(20) == start + left.replace("490", "1")
    assert image_data().line(21) == f"{start}{left}; 30x20 px, enlarged to 21 px"
    assert image_data(images=np.zeros((1, 3, 30, 20))).line(21) == f"{start}{left}; 20x30 px, enlarged to 21 px"
    assert image_data(with_more=2).line(8) == f"{start}{left}; of 2 files with several pictures the first is used"
    assert image_data(value_range=(0.5, 4095.0)).line(8) == f"{start}{left}; values 0.5 .. 4095 scaled to 0 .. 255"
    assert image_data(passed_over=("1 hidden (a)", "2 no images (b, c)")).line(8) == (
        f"{start}{left}; passed over: 1 hidden (a), 2 no images (b, c)"
    )
    many = image_data(class_names=["x"] * 1000)
    assert "of 1,000 classes" in many.line(8)


def test_content_follows_labels_classes_parts_and_files():
    def content(names=("a", "b"), labels=(0, 1, 1), parts=(("train", (0, 1)), ("val", (2,))), digests=bytes(96)):
        arrays = {name: np.array(ids) for name, ids in parts}
        return content_of(list(names), np.array(labels), arrays, np.frombuffer(digests, np.uint8).reshape(3, 32))

    plain = content()
    assert plain.startswith("3 images, 2 classes, sha256 ")
    assert len(plain.rpartition(" ")[2]) == 16
    assert content(parts=(("val", (2,)), ("train", (0, 1)))) == plain, "in any order"
    others = [
        content(names=("a", "c")),
        content(labels=(0, 1, 0)),
        content(parts=(("train", (0,)), ("val", (1, 2)))),
        content(parts=(("train", (0, 1)), ("test", (2,)))),
        content(digests=bytes(95) + b"x"),
    ]
    assert len({plain, *others}) == 6
    strided = np.zeros((32, 3), np.uint8).T
    assert (
        content_of(["a", "b"], np.array([0, 1, 1]), {"train": np.array([0, 1]), "val": np.array([2])}, strided) == plain
    )


def test_names_are_shown_whatever_their_bytes_are():
    assert shown("chèvre") == "chèvre"
    assert shown(os.fsdecode(b"ch\xe8vre")) == "ch\\xe8vre"


# --- listing


@pytest.fixture
def listed(monkeypatch, tmp_path) -> list[tuple[Any, ...]]:
    """The calls of the modules that list; each list is another."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setenv("HOME", str(tmp_path))

    def module(name: str) -> SimpleNamespace:
        def find(*arguments: Any) -> Found:
            calls.append((name, *arguments))
            ids, labels = np.arange(4), np.array([0, 0, 1, 1])
            images = np.zeros((4, 3, 2, 2), np.uint8)
            parts = {"train": ids, "val": ids[:1], "test": ids[1:2]}
            decode = lambda size: (images + (size or 0), (0.0, 9.0), 0)  # noqa: E731
            return Found(labels, ["a", "b"], parts, f"content {len(calls)}", decode, ("1 hidden (x)",))

        return SimpleNamespace(find=find)

    monkeypatch.setattr(dataset, "import_module", module)
    forget()
    yield calls
    forget()


def config(**changes: Any) -> DataConfig:
    values = {"name": "imagefolder", "root": "~/pets", "cache_dir": "~/cache", "cache_size": 8, "batch_size": 2}
    return DataConfig(**{**PLAIN["data"], **values, **changes})


@pytest.mark.parametrize(
    ("name", "module"),
    [("imagefolder", "folder"), ("tiny_imagenet", "tiny_imagenet"), ("cifar10", "cifar"), ("cifar100", "cifar")],
)
def test_each_data_set_is_listed_by_its_module(name, module, listed, tmp_path):
    known_content(config(name=name, official_val=True), fetch=False)
    assert listed == [(f"lora_vit.data.{module}", name, f"{tmp_path}/pets", f"{tmp_path}/cache", False, True, False)]


@pytest.mark.parametrize(("name", "size"), [("digits", None), ("fake", 8)])
def test_what_a_package_brings_is_known_by_its_version(name, size, listed):
    assert known_content(config(name=name)) is None
    assert listed == []
    load_data(config(name=name))
    assert listed == [("lora_vit.data.digits", name, size)]


def test_files_are_listed_once_for_each_place_and_way(listed):
    assert known_content(config()) == "content 1"
    for same in ({"cache_size": 16}, {"split_seed": 3}, {"batch_size": 1}, {"augment": "crop_flip"}):
        assert known_content(config(**same)) == "content 1", same
    others = ({"root": "there"}, {"official_val": True}, {"cache_dir": "there"}, {"name": "cifar10"})
    assert [known_content(config(**other)) for other in others] == [f"content {i}" for i in (2, 3, 4, 5)]
    assert known_content(config()) == "content 1"
    for size in (8, 16, 8):
        load_data(config(name="fake", cache_size=size))
    assert len(listed) == 7
    forget()
    assert known_content(config()) == "content 8"


def test_loading_takes_everything_from_the_list(listed):
    data = load_data(config(content="content 1"), quiet=True)
    assert listed[0][-3:] == (True, False, True), "quiet"
    assert (data.images == 8).all()
    assert (data.class_names, data.labels.tolist()) == (["a", "b"], [0, 0, 1, 1])
    assert (data.passed_over, data.value_range) == (("1 hidden (x)",), (0.0, 9.0))
    assert data.splits["val"].tolist() == [0]
    assert data.fingerprint == fingerprint("content 1", data.splits)
    with pytest.raises(ConfigError) as caught:
        load_data(config(content="7 images"))
    assert str(caught.value) == (
        "data.root=~/pets holds other images, labels or class names than asked for: content 1, not 7 images"
    )
    forget()
    load_data(config())
    assert listed[-1][-3] is False
