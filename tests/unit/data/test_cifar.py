"""CIFAR without its files, and with files of its form (torchvision reads them; only the checksums are replaced)."""

from __future__ import annotations

import hashlib
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR100

from lora_vit.config import DataConfig
from lora_vit.data.dataset import ImageData, forget, load_data
from lora_vit.errors import ConfigError


def config(tmp_path: Path, name: str = "cifar100", **changes) -> DataConfig:
    values = {
        "name": name,
        "root": str(tmp_path / "data"),
        "batch_size": 1,
        "augment": "none",
        "split_seed": 0,
        "val_fraction": 0.1,
        "test_fraction": None,
        "train_per_class": None,
        "official_val": False,
        "cache_size": None,
        "cache_dir": str(tmp_path / "cache"),
    }
    return DataConfig(**{**values, **changes})


def fresh(data_config: DataConfig) -> ImageData:
    """The data set, its files read anew."""
    forget()
    return load_data(data_config, quiet=True)


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """Writes CIFAR-100 files of 1,000 training and 200 test images; called again, with other pixels of one image."""
    base = tmp_path / "data" / CIFAR100.base_folder
    base.mkdir(parents=True)

    def write(first_pixel: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        arrays = {name: rng.integers(0, 256, (n, 3072), dtype=np.uint8) for name, n in (("train", 1000), ("test", 200))}
        arrays["train"][0, 0] = first_pixel
        sums = {}
        for name, pixels in arrays.items():
            fine = [i % 100 for i in range(len(pixels))]
            (base / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": fine}))
        (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
        for name in ("train", "test", "meta"):
            sums[name] = hashlib.md5((base / name).read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
        monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
        monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
        return arrays

    return write


def test_cifar100(cifar100, tmp_path):
    arrays = cifar100()
    data = fresh(config(tmp_path))
    assert data.images.dtype == np.uint8
    assert data.images.shape == (1200, 3, 32, 32)
    # the files hold a red, a green and a blue plane one after another
    np.testing.assert_array_equal(data.images[7], arrays["train"][7].reshape(3, 32, 32))
    np.testing.assert_array_equal(data.images[1003], arrays["test"][3].reshape(3, 32, 32))
    assert data.class_names[42] == "class 42"
    assert data.splits["test"].tolist() == list(range(1000, 1200))
    assert np.bincount(data.labels[data.splits["val"]]).tolist() == [1] * 100
    assert sorted([*data.splits["train"], *data.splits["val"]]) == list(range(1000))


def test_the_fingerprint_follows_pixels_and_split(cifar100, tmp_path):
    cifar100()
    first = fresh(config(tmp_path)).fingerprint
    assert fresh(config(tmp_path)).fingerprint == first
    assert fresh(config(tmp_path, split_seed=1)).fingerprint != first
    cifar100(first_pixel=1)
    assert fresh(config(tmp_path)).fingerprint != first


def test_data_that_is_there_is_only_read(cifar100, tmp_path):
    """A root that others share may be read-only: no lock or anything else is put into it, or anywhere."""
    cifar100()
    before = sorted(p.name for p in (tmp_path / "data").rglob("*"))
    fresh(config(tmp_path))
    assert sorted(p.name for p in (tmp_path / "data").rglob("*")) == before
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_no_network(name, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(ConfigError, match="experiment=quickstart") as error:
        fresh(config(tmp_path, name))
    message = str(error.value)
    assert str(tmp_path / "data") in message
    assert {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[name] in message
    assert "\n" not in message


@pytest.mark.parametrize("given", ["data/cifar-100-python", "data/cifar-100-python.tar.gz", "."])
def test_one_level_off(given, cifar100, tmp_path):
    cifar100()
    (tmp_path / "data" / CIFAR100.filename).touch()
    expected = fresh(config(tmp_path)).fingerprint
    assert fresh(config(tmp_path, root=str(tmp_path / given))).fingerprint == expected


def test_damage_is_told_as_damage(cifar100, tmp_path, monkeypatch):
    cifar100()
    (tmp_path / "data" / CIFAR100.base_folder / "train").write_bytes(b"cut off")

    def no_network(*args, **kwargs):
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", no_network)
    with pytest.raises(ConfigError, match=r"cifar-100-python/ or .* is damaged or not whole, .* unpack") as error:
        fresh(config(tmp_path))
    assert "remove" not in str(error.value)
