"""What is in no part: broken files and small classes that are skipped by name; images that no reader here opens."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from pictures import data_config, fresh, paint, refused, shades

from lora_vit.data.dataset import ImageData

SKIP = {"on_broken": "skip", "cache_size": 8}


@pytest.fixture
def pets(tmp_path) -> Path:
    """Ten cats, nine dogs, two emus and an empty folder; one cat and seven of the dogs are broken."""
    for c, (name, count) in enumerate({"cat": 10, "dog": 9, "emu": 2}.items()):
        for i in range(count):
            paint(tmp_path / "pets" / name / f"{i}.png", 10 * c + i, (12, 12))
    (tmp_path / "pets" / "fox").mkdir()
    return tmp_path / "pets"


def harm(*files: Path) -> None:
    for file in files:
        file.write_bytes(file.read_bytes()[:40])


def test_broken_files_are_in_no_part_and_keep_their_ids(pets, tmp_path):
    """As if they had never been there, but for the rows; what is left out is told in the line, the record, by name."""
    harm(pets / "cat/3.png", pets / "dog/0.png")
    config = data_config(tmp_path, **SKIP)
    for data in (fresh(config), fresh(config)):  # decoded, and from the cache
        used = np.sort(np.concatenate([*data.splits.values()]))
        assert used.tolist() == [i for i in range(19) if i not in (3, 10)]
        called = [data.class_names[label] for label in data.labels[used]]
        assert called == [Path(data.names[i]).parent.name for i in used]
        assert [shades(data)[i] for i in used] == used.tolist()
        assert (data.class_names, data.labels[[3, 10, 19, 20]].tolist()) == (["cat", "dog"], [-1] * 4)
        left_out = data.card()["left_out"]
        assert left_out["classes with too few images"] == ["emu (2)", "fox (0)"]
        assert [text.partition(" (")[0] for text in left_out["broken files"]] == ["cat/3.png", "dog/0.png"]
        assert "data: 17 images of 2 classes (cat, dog)" in (line := data.line(8))
        assert "; left out: 2 broken files (cat/3.png (" in line
        assert line.endswith("), 2 classes with too few images (emu (2), fox (0))")
    json.dumps(data.card())
    assert data.fingerprint != fresh(data_config(tmp_path, **SKIP, split_seed=1)).fingerprint
    refuse = data_config(tmp_path, cache_size=8)
    assert "class folder" in refused(fresh, refuse)
    (pets / "fox").rmdir()
    assert "class 'emu' has 2 images, too few to be in train, val, test" in refused(fresh, refuse)
    for i in (2, 3):
        paint(pets / f"emu/{i}.png", 30 + i)
    assert fresh(config).left_out.keys() == {"broken files"}, "a cache that lacks them is not one for all"
    assert "2 broken images below" in (said := refused(fresh, refuse))
    assert "leave them out by data.on_broken=skip" in said


def test_a_class_that_is_broken_as_a_whole_leaves_given_parts_too(pets, tmp_path):
    for file in [*(pets / "dog").iterdir(), *(pets / "emu").iterdir()]:
        file.rename(paint(tmp_path / "pets/train" / file.parent.name / file.name))
    (pets / "cat").rename(pets / "train/cat")
    (pets / "fox").rmdir()
    (pets / "emu").rmdir()
    (pets / "dog").rmdir()
    for name in ("cat", "dog", "emu"):
        paint(pets / "val" / name / "v.png", 99)
    harm(*(pets / "train/emu").iterdir())
    data = fresh(data_config(tmp_path, **SKIP, test_fraction=None))
    assert data.class_names == ["cat", "dog"]
    assert {name: len(ids) for name, ids in data.splits.items()} == {"train": 19, "val": 2}
    harm(*(pets / "train/dog").iterdir())
    said = refused(fresh, data_config(tmp_path, **SKIP, test_fraction=None))
    assert "class 'dog' has 0 images" in said, "a classifier needs two"


def test_no_test_part(pets, tmp_path):
    def line(**changes) -> tuple[ImageData, str]:
        data = fresh(data_config(tmp_path, **SKIP, **changes))
        return data, data.line(8)

    for none in (0.0, None):
        data, said = line(test_fraction=none)
        assert (set(data.splits), data.card()["test"]) == ({"train", "val"}, 0)
        assert "; no test part: nothing is tested; one of 5 val images is 20 points" in said
    assert "no test part" not in line(test_fraction=0.2)[1]


def test_plugins_of_pillow_are_asked_where_they_are_installed(monkeypatch):
    asked: list[str] = []
    heif, avif = ModuleType("pillow_heif"), ModuleType("pillow_avif")
    heif.register_heif_opener = lambda: asked.append("heif")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    monkeypatch.setitem(sys.modules, "pillow_avif", avif)
    spec = importlib.util.find_spec("lora_vit.data.preprocessing")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # type: ignore[union-attr,arg-type]
    assert asked == ["heif"]
