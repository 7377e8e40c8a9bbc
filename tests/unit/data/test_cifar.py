"""CIFAR without its files, and with files of its form (torchvision reads them; only the checksums are replaced)."""

from __future__ import annotations

import hashlib
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from pictures import data_config, fresh, refused
from torchvision.datasets import CIFAR10, CIFAR100


def config(tmp_path: Path, name: str = "cifar100", **changes):
    return data_config(tmp_path, name, root=str(tmp_path / "data"), val_fraction=0.1, test_fraction=None, **changes)


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr("urllib.request.urlopen", fail)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes files of 1,000 training and 200 test images; called again, with other pixels of one image."""

    def write(kind=CIFAR100, first_pixel: int = 0) -> dict[str, np.ndarray]:
        base = tmp_path / "data" / kind.base_folder
        base.mkdir(parents=True, exist_ok=True)
        classes, labels = (100, "fine_labels") if kind is CIFAR100 else (10, "labels")
        parts = {name: 1000 // len(kind.train_list) for name, _ in kind.train_list}
        rng = np.random.default_rng(0)
        arrays = {}
        for name, count in {**parts, kind.test_list[0][0]: 200}.items():
            arrays[name] = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            if len(arrays) == 1:
                arrays[name][0, 0] = first_pixel
            content = {"data": arrays[name], labels: [i % classes for i in range(count)]}
            (base / name).write_bytes(pickle.dumps(content))
        names = {kind.meta["key"]: [f"class {i}" for i in range(classes)]}
        (base / kind.meta["filename"]).write_bytes(pickle.dumps(names))

        def md5(name: str) -> str:
            return hashlib.md5((base / name).read_bytes(), usedforsecurity=False).hexdigest()

        monkeypatch.setattr(kind, "train_list", [[name, md5(name)] for name in parts])
        monkeypatch.setattr(kind, "test_list", [[name, md5(name)] for name, _ in kind.test_list])
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(kind.meta["filename"])})
        return arrays

    return write


@pytest.mark.parametrize(("name", "kind"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_its_own_files_are_read_and_nothing_is_written(name, kind, written, tmp_path):
    """A root that others share may be read-only: no lock or anything else is put into it, or anywhere."""
    train, *_, test = written(kind).values()
    before = sorted(tmp_path.rglob("*"))
    data = fresh(config(tmp_path, name))
    assert (data.images.dtype, data.images.shape) == (np.uint8, (1200, 3, 32, 32))
    # the files hold a red, a green and a blue plane one after another
    np.testing.assert_array_equal(data.images[7], train[7].reshape(3, 32, 32))
    np.testing.assert_array_equal(data.images[1003], test[3].reshape(3, 32, 32))
    classes = 10 if kind is CIFAR10 else 100
    assert data.class_names == [f"class {i}" for i in range(classes)]
    assert data.splits["test"].tolist() == list(range(1000, 1200))
    assert np.bincount(data.labels[data.splits["val"]]).tolist() == [100 // classes] * classes
    assert sorted([*data.splits["train"], *data.splits["val"]]) == list(range(1000))
    assert sorted(tmp_path.rglob("*")) == before
    assert fresh(config(tmp_path, name, split_seed=1)).fingerprint != data.fingerprint
    written(kind, first_pixel=1)
    assert fresh(config(tmp_path, name)).fingerprint != data.fingerprint


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("harm", ["absent", "damaged"])
@pytest.mark.parametrize(("name", "kind"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_absent_or_damaged_without_a_network(harm, name, kind, written, tmp_path):
    if harm == "damaged":
        written(kind)
        (tmp_path / "data" / kind.base_folder / kind.train_list[0][0]).write_bytes(b"cut off")
    message = refused(fresh, config(tmp_path, name))
    assert f"{kind.__name__} is absent from data.root={tmp_path}/data or damaged" in message
    assert f"put {kind.filename} (md5 {kind.tgz_md5}) or {kind.base_folder}/ there" in message
    assert "Name or service not known" in message
