"""Splits are stratified, disjoint and keyed; streams give the same samples to any number of processes."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import numpy as np
import pytest
import torch
from pictures import fresh
from plain_trials import plain_trial
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_vit import randomness
from lora_vit.data.augment import Transform
from lora_vit.data.dataset import Found
from lora_vit.data.splits import divide, keep_per_class, split_per_class
from lora_vit.data.stream import Samples, TrainStream
from lora_vit.errors import ConfigError

LABELS = np.repeat(np.arange(5), 40)
NAMES = list("abcde")
IDS = np.arange(200)


def splits(seed=0):
    return split_per_class(LABELS, IDS, {"val": 0.1, "test": 0.2}, seed, NAMES)


def test_stratified_disjoint_complete_and_keyed():
    found = splits()
    assert (splits(0)["val"] == found["val"]).all()
    assert (splits(1)["val"] != found["val"]).any()
    assert {k: len(v) for k, v in found.items()} == {"val": 20, "test": 40, "train": 140}
    assert sorted(np.concatenate(list(found.values()))) == list(IDS)
    for name, count in (("val", 4), ("test", 8), ("train", 28)):
        assert (np.bincount(LABELS[found[name]]) == count).all()


def test_fewer_per_class_are_a_subset():
    train = splits()["train"]
    kept = [set(keep_per_class(LABELS, train, n, 0)) for n in (3, 10, 28)]
    assert kept[0] < kept[1] < kept[2] == set(train)
    assert len(kept[0]) == 15


def test_too_few_images_name_the_class():
    with pytest.raises(ConfigError, match="class 'c' has 2 images"):
        split_per_class(LABELS, np.delete(IDS, slice(82, 120)), {"val": 0.1, "test": 0.1}, 0, NAMES)
    with pytest.raises(ConfigError, match=r"data\.train_per_class=29"):
        keep_per_class(LABELS, splits()["train"], 29, 0)


def test_a_class_is_divided_in_the_order_of_its_own_key():
    """Written out for unsorted ids of four classes: val first, test next, in the order of ("split", seed, class)."""
    found = split_per_class(LABELS, IDS[:39:-1], {"val": 0.1, "test": 0.2}, 3, NAMES)
    orders = [40 * c + randomness.permutation(40, "split", 3, c) for c in range(1, 5)]
    assert found["val"].tolist() == sorted(i for order in orders for i in order[:4])
    assert found["test"].tolist() == sorted(i for order in orders for i in order[4:12])
    assert found["train"].tolist() == sorted(i for order in orders for i in order[12:])


def test_the_kept_of_a_class_are_the_first_in_the_order_of_its_own_key():
    kept = keep_per_class(LABELS, IDS[::-1], 7, 3)
    orders = [40 * c + randomness.permutation(40, "train_per_class", 3, c) for c in range(5)]
    assert kept.tolist() == sorted(i for order in orders for i in order[:7])


@pytest.mark.parametrize(
    ("size", "fraction", "count"),
    [(40, 0.001, 1), (40, 0.037, 1), (40, 0.038, 2), (10, 0.25, 2), (10, 0.35, 4), (3, 0.34, 1), (2, 0.1, 1)],
)
def test_numbers_are_rounded_to_the_nearest_whole_and_at_least_one(size, fraction, count):
    """Halves go to the even number, as Python rounds."""
    found = split_per_class(np.zeros(size, int), np.arange(size), {"val": fraction}, 0, ["only"])
    assert {name: len(ids) for name, ids in found.items()} == {"val": count, "train": size - count}


@pytest.mark.parametrize("batch_size", [100, 101])
def test_a_batch_of_all_training_images_is_the_largest(batch_size):
    config = dataclasses.replace(plain_trial().data, batch_size=batch_size, train_per_class=20, split_seed=5)
    found = Found(
        LABELS, NAMES, {"train": IDS, "val": IDS[:3], "test": IDS[3:5]}, "content", lambda _: pytest.fail("decoded")
    )
    if batch_size == 101:
        with pytest.raises(ConfigError, match=r"data\.batch_size=101 is more than the 100 training images"):
            divide(found, config)
        return
    splits, fingerprint = divide(found, config)
    assert splits["train"].tolist() == keep_per_class(LABELS, IDS, 20, 5).tolist()
    assert (splits["val"].tolist(), splits["test"].tolist()) == ([0, 1, 2], [3, 4])
    # Spelt out byte by byte: another digest would turn every recorded trial away from its own data.
    digest = hashlib.sha256(b"content")
    for name in ("test", "train", "val"):
        digest.update(name.encode() + b"\0" + struct.pack(f"<{len(splits[name])}q", *splits[name]))
    assert fingerprint == digest.hexdigest()[:16]


@pytest.fixture(scope="module")
def samples():
    return Samples(fresh(plain_trial().data), torch.device("cpu"))


def stream(samples, rank=0, world_size=1, seed=0):
    transform = Transform(16, "crop_flip", torch.device("cpu"), torch.float64)
    return TrainStream(samples, transform, 8, seed, rank, world_size)


def test_two_processes_share_each_batch(samples):
    one, halves = stream(samples), [stream(samples, r, 2) for r in (0, 1)]
    assert one.steps_per_epoch == 60 // 8
    for epoch, step in ((0, 0), (0, 6), (3, 2)):
        whole, parts = one.batch(epoch, step), [h.batch(epoch, step) for h in halves]
        assert (np.concatenate([p.ids for p in parts]) == whole.ids).all()
        torch.testing.assert_close(torch.cat([p.images for p in parts]), whole.images, rtol=0, atol=1e-12)


def test_order_is_a_function_of_seed_and_epoch(samples):
    def epoch_ids(seed, epoch):
        s = stream(samples, seed=seed)
        return [tuple(s.batch_ids(epoch, i)) for i in range(s.steps_per_epoch)]

    assert epoch_ids(0, 1) == epoch_ids(0, 1)
    assert epoch_ids(0, 1) != epoch_ids(0, 2)
    assert epoch_ids(0, 1) != epoch_ids(1, 1)
    seen = [i for batch in epoch_ids(0, 1) for i in batch]
    assert len(set(seen)) == len(seen) == 56


def test_a_batch_holds_the_images_and_labels_of_its_samples(samples):
    s, data = stream(samples, seed=4), samples.data
    ids = data.splits["train"][randomness.permutation(60, "order", 4, 2)][8:16]
    batch = s.batch(2, 1)
    assert batch.ids.tolist() == ids.tolist()
    assert batch.labels.tolist() == data.labels[ids].tolist()
    expected = s.transform.train(torch.from_numpy(data.images[ids]), 4, 2, ids)
    torch.testing.assert_close(batch.images, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize(("share", "resident"), [(0.2499, True), (0.25, False), (0.9, False)])
def test_images_lie_on_the_gpu_where_they_are_less_than_a_quarter_of_what_is_free(share, resident, monkeypatch):
    data = fresh(plain_trial().data)
    free = int(data.images.nbytes / share)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (free if device == torch.device("cuda") else 1, 1 << 60)
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode():
        held = Samples(data, torch.device("cuda"))
        images, labels = held.gather(np.arange(5))
    assert (held._resident is not None) == resident
    assert (images.device.type, labels.device.type) == ("cuda", "cuda")
    assert (images.shape, labels.shape) == ((5, *data.images.shape[1:]), (5,))
