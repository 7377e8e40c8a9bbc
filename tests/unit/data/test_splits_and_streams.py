"""Splits are stratified, disjoint and keyed; streams give the same samples to any number of processes."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import struct
import threading

import numpy as np
import pytest
import torch
from pictures import fresh
from plain_trials import plain_trial
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_vit import randomness
from lora_vit.data import stream
from lora_vit.data.augment import Transform, mixed
from lora_vit.data.dataset import Found
from lora_vit.data.splits import divide, groups_of
from lora_vit.data.stream import Samples, TrainStream
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError

LABELS = np.repeat(np.arange(5), 40)
NAMES = list("abcde")
IDS = np.arange(200)


def divided(ids=IDS, labels=LABELS, parts=None, groups=None, **changes) -> tuple[dict[str, np.ndarray], str]:
    """Splits and fingerprint; ``parts``: what is given apart."""
    values = {"val_fraction": 0.1, "test_fraction": 0.2, "split_seed": 0, "batch_size": 1, **changes}
    parts = {"train": ids, **(parts or {})}
    found = Found(labels, NAMES, parts, "content", lambda _: pytest.fail("decoded"), groups=groups)
    return divide(found, dataclasses.replace(plain_trial().data, **values))


def test_too_few_images_name_the_class():
    with pytest.raises(ConfigError, match=r"class 'c' has 2 images, too few .*: add images, or drop the class"):
        divided(np.delete(IDS, slice(82, 120)), test_fraction=0.1)
    with pytest.raises(ConfigError, match=r"data\.train_per_class=29: class 'a' has only 28 .* give at most that"):
        divided(train_per_class=29)


def test_a_class_is_divided_and_reduced_in_the_orders_of_its_own_keys():
    """Written out for unsorted ids of four classes: val first, test next, in the order of ("split", seed, class).

    So splits are stratified, disjoint and complete, and fewer training images are a subset of more.
    """
    orders = [40 * c + randomness.permutation(40, "split", 3, c) for c in range(1, 5)]
    kept = [np.sort(o[12:])[randomness.permutation(28, "train_per_class", 3, c)] for c, o in enumerate(orders, 1)]
    for number in (None, 7):
        found, _ = divided(IDS[:39:-1], split_seed=3, train_per_class=number)
        assert found["val"].tolist() == sorted(i for order in orders for i in order[:4])
        assert found["test"].tolist() == sorted(i for order in orders for i in order[4:12])
        assert found["train"].tolist() == sorted(i for order in kept for i in order[:number])


@pytest.mark.parametrize(
    ("size", "fraction", "count"),
    [(40, 0.001, 1), (40, 0.037, 1), (40, 0.038, 2), (10, 0.25, 2), (10, 0.35, 4), (3, 0.34, 1), (2, 0.1, 1)],
)
def test_numbers_are_rounded_to_the_nearest_whole_and_at_least_one(size, fraction, count):
    """Halves go to the even number, as Python rounds."""
    how = {"val_fraction": fraction, "train_per_class": size - count}
    found, _ = divided(np.arange(size), np.zeros(size, int), {"test": IDS[:0]}, **how)
    assert {name: len(ids) for name, ids in found.items()} == {"val": count, "train": size - count, "test": 0}


def test_given_parts_the_fingerprint_and_the_largest_batch():
    given = {"val": IDS[:3], "test": IDS[3:5]}
    splits, fingerprint = divided(parts=given, train_per_class=20, split_seed=5, batch_size=100)
    orders = [40 * c + randomness.permutation(40, "train_per_class", 5, c) for c in range(5)]
    assert splits["train"].tolist() == sorted(i for order in orders for i in order[:20])
    assert (splits["val"].tolist(), splits["test"].tolist()) == ([0, 1, 2], [3, 4])
    # Spelt out byte by byte: another digest would turn every recorded trial away from its own data.
    digest = hashlib.sha256(b"content")
    for name in ("test", "train", "val"):
        digest.update(name.encode() + b"\0" + struct.pack(f"<{len(splits[name])}q", *splits[name]))
    assert fingerprint == digest.hexdigest()[:16]
    with pytest.raises(ConfigError, match=r"data\.batch_size=101 is more than the 100 training images"):
        divided(parts=given, train_per_class=20, batch_size=101)


@pytest.mark.parametrize("augment", ["crop_flip", ["crop_flip", "random_erasing", "mixup", "cutmix"]])
def test_processes_share_each_batch(augment):
    """It holds the augmented images and the labels of its samples, in the order of its key."""
    data, cpu, settings = fresh(plain_trial().data), torch.device("cpu"), plain_trial({"data.augment": augment}).data
    transform = Transform(settings, 16, cpu, torch.float64, (0.5,) * 3, (0.5,) * 3, False)
    shared = Samples(data, cpu), transform, 8, 4
    one, *quarters = (TrainStream(*shared, Process(rank, size)) for rank, size in ((0, 1), *((i, 4) for i in range(4))))
    assert one.steps_per_epoch == 60 // 8
    for epoch, step in ((1, 0), (0, 6), (3, 2), (2, 1)):
        order = data.splits["train"][randomness.permutation(60, "order", 4, epoch)]
        ids = order[8 * step : 8 * step + 8]
        images, labels, share = one.batch(epoch, step)
        assert one.batch_ids(epoch, step, whole=True).tolist() == ids.tolist()
        expected = transform.train(torch.from_numpy(data.images[ids]), 4, epoch, ids)
        if transform.mixes:
            assert labels.T.tolist() == [data.labels[ids].tolist(), data.labels[np.roll(ids, 1)].tolist()]
            expected, theirs = mixed(torch.cat([expected[-1:], expected]), transform.mixes, 4, epoch, step)
            assert 0 < share == theirs < 1
        else:
            assert labels.tolist() == data.labels[ids].tolist()
            assert share == 1
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-12)
        parts = [quarter.batch(epoch, step) for quarter in quarters]
        assert {part[2] for part in parts} == {share}
        torch.testing.assert_close(torch.cat([p[0] for p in parts]), images, rtol=0, atol=1e-12)
        assert torch.cat([p[1] for p in parts]).tolist() == labels.tolist()


def test_images_for_a_gpu_are_read_ahead_in_the_same_order(monkeypatch):
    """By other threads, each batch once, whichever epoch comes next; a batch that cannot be read is an error there."""
    cpu, read, threads = torch.device("cpu"), [], set()

    def to_device(array, device):
        threads.add(threading.current_thread())
        read.extend([array.tolist()] if array.ndim == 1 else [])
        return torch.from_numpy(array)

    samples = Samples(data := fresh(plain_trial().data), cpu)
    transform = Transform(plain_trial().data, 16, cpu, torch.float64, (0.5,) * 3, (0.5,) * 3, False)
    plain = TrainStream(samples, transform, 8, 4, Process())
    expected = {(epoch, step): plain.batch(epoch, step) for epoch in (0, 1) for step in range(7)}
    monkeypatch.setattr(stream, "to_device", to_device)
    ahead = Samples(data, cpu)
    ahead.device = torch.device("cuda")
    other = TrainStream(ahead, plain.transform, 8, 4, Process())
    steps = [(0, 3), (0, 4), (0, 5), (0, 6), (1, 0), (1, 1)]
    for at in steps:
        for mine, theirs in zip(other.batch(*at)[:2], expected[at][:2], strict=True):
            assert torch.equal(mine, theirs)
    for _, waits in other._read.values():
        waits()
    assert threading.current_thread() not in threads
    assert sorted(read) == sorted(plain.batch_ids(*at).tolist() for at in (*steps, (1, 2), (1, 3), (1, 4)))
    monkeypatch.setattr(ahead, "labels", None)
    with pytest.raises(TypeError):
        other.batch(1, 5)


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize(("share", "resident"), [(0.2499, True), (0.25, False), (0.9, False)])
def test_images_lie_on_the_gpu_where_they_are_less_than_a_quarter_of_what_is_free(share, resident, monkeypatch):
    data = fresh(plain_trial().data)
    free = int(data.images.nbytes / share)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (free if device == torch.device("cuda") else 1, 1 << 60)
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    pieces: list[int] = []
    moved = stream.to_device
    monkeypatch.setattr(stream, "_PIECE", 5000)
    monkeypatch.setattr(stream, "to_device", lambda array, device: pieces.append(array.nbytes) or moved(array, device))
    with FakeTensorMode():
        held = Samples(data, torch.device("cuda"))
        assert sum(pieces) == resident * data.images.nbytes
        assert max(pieces, default=0) <= 5000 + data.images[0].nbytes
        images, labels = held.gather(np.arange(5))
    assert (held._resident is not None) == resident
    assert (images.device.type, labels.device.type) == ("cuda", "cuda")
    assert (images.shape, labels.shape) == ((5, *data.images.shape[1:]), (5,))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("given", [False, True])
def test_groups_are_whole_and_parts_have_their_fractions(given, seed):
    """Of 900 images in groups of 1 to 12 and several classes, in any order; each class but those in one group."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(200), rng.integers(1, 13, 200))[:900]
    labels = np.where(rng.random(900) < 0.1, rng.integers(0, 5, 900), groups % 5)
    ids = rng.permutation(900)
    parts = {"val": ids[:90]} if given else {}
    splits, fingerprint = divided(ids[90 * given :], labels, parts, groups=groups, split_seed=seed)
    whole = {part: found for part, found in splits.items() if part not in parts}
    assert sorted(np.concatenate([*splits.values()])) == list(range(900))
    assert sum(len({*groups[found]}) for found in whole.values()) == len({*groups[np.concatenate([*whole.values()])]})
    for part, fraction in {"val": 0.1, "test": 0.2}.items():
        for label in range(5) if part in whole else ():
            there = labels[np.concatenate([*whole.values()])]
            assert abs((labels[splits[part]] == label).sum() / (there == label).sum() - fraction) < 0.05
    again = divided(rng.permutation(ids[90 * given :]), labels, parts, groups=groups, split_seed=seed)
    other = divided(ids[90 * given :], labels, parts, groups=groups, split_seed=seed + 1)
    assert again[1] == fingerprint != other[1]


def test_groups_of_a_class_are_in_train_first_and_none_is_too_large_for_all():
    one_group = np.where(LABELS == 2, 0, np.arange(200))
    splits, _ = divided(groups=one_group)
    assert [np.isin(np.flatnonzero(LABELS == 2), ids).sum() for ids in splits.values()] == [40, 0, 0]
    with pytest.raises(ConfigError, match=r"data\.group=None leaves val and test empty: give larger fractions"):
        divided(groups=np.zeros(200))


@pytest.mark.parametrize(
    ("group", "expected"),
    [(1, [0, 0, 1, 0]), (2, [0, 1, 2, 0]), (r"/(p\d)", [0, 0, 1, 0]), ("(.)[.]png", [0, 1, 0, 0]),
     (3, "4 of 4 files are without it"), (0, "without it"), ("t/(p[^2])", r"2 of .* \((train/)?cat/p2/left/0.png, "),
     ("(p", "missing"), ("p", "not one pair"), ("(p)(1)", "not one pair")],
)  # fmt: skip
@pytest.mark.parametrize("above", ["", "train/"])
def test_groups_by_folders_and_by_patterns(above, group, expected):
    """Below the class's folder; a patient of two classes is one."""
    names = [f"{above}{name}.png" for name in ("cat/p1/left/0", "cat/p1/right/1", "cat/p2/left/0", "dog/p1/left/0")]
    found = Found(np.array([0, 0, 0, 1]), ["cat", "dog"], {"train": np.arange(4)}, "", lambda _: None, names=names)
    if isinstance(expected, list):
        assert groups_of(found, group).tolist() == expected
    else:
        with pytest.raises(ConfigError, match=rf"^data\.group={re.escape(str(group))}.*{expected}"):
            groups_of(found, group)
    with pytest.raises(ConfigError, match="they are no files"):
        groups_of(dataclasses.replace(found, names=()), 1)
    column = np.array(["b", "a", "b", ""], object)
    with pytest.raises(ConfigError, match="1 of 4 files are without it"):
        groups_of(dataclasses.replace(found, groups=column), "patient")


def test_training_examples_are_as_the_classes_are_and_a_subset_of_more():
    """Of classes of 4, 40, 80 and 160: of each at least one, and none has fewer of more."""
    labels, before = np.repeat(np.arange(4), [4, 40, 80, 160]), set[int]()
    for number in (4, 5, 8, 50, 51, 90, 196):
        splits, _ = divided(np.arange(284), labels, train_examples=number, split_seed=1)
        train = set(splits["train"].tolist())
        assert before <= train
        assert len(train) == number
        counts, wanted = np.bincount(labels[list(train)]), number * np.array([2, 28, 56, 112]) / 198
        assert (np.abs(counts - wanted) < (1 if number > 40 else 2)).all()
        before = train
    for wrong in (3, 199):
        with pytest.raises(ConfigError, match=rf"data\.train_examples={wrong}: there are 198 training images of 4"):
            divided(np.arange(284), labels, train_examples=wrong)
