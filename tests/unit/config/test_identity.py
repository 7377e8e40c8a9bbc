"""Trial id and cell id against hashes computed here, from values written out here."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
from plain_trials import BASELINE, PLAIN, plain_trial

from lora_vit.config import canonical, cell_id, file_sha256, is_weights_file, trial_id
from lora_vit.errors import ConfigError

CANONICAL = {
    "model": {key: value for key, value in PLAIN["model"].items() if key != "weights_sha256"},
    "data": {key: value for key, value in PLAIN["data"].items() if key not in ("root", "cache_dir")},
    "optimizer": PLAIN["optimizer"],
    "lora": PLAIN["lora"],
    "trainer": {"epochs": 2, "precision": "fp64", "compile": False},
    "seed": 0,
    "schema": 3,
}
# every setting, another value of it, and whether that is another trial
OTHER = {
    "model.name": ("vit_b_16", True),
    "model.weights": ("GLYPHS_V1", True),
    "model.image_size": (8, True),
    "model.patch_size": (4, True),
    "model.num_layers": (3, True),
    "model.num_heads": (4, True),
    "model.hidden_dim": (64, True),
    "model.mlp_dim": (64, True),
    "model.library": ("timm", True),
    "model.mean": ([0.5, 0.5, 0.5], True),
    "model.std": ([0.5, 0.5, 0.5], True),
    "model.interpolation": ("bicubic", True),
    "model.head_dropout": (0.2, True),
    "model.weights_sha256": ("0" * 64, True),
    "data.name": ("digits", True),
    "data.root": ("elsewhere", False),
    "data.batch_size": (4, True),
    "data.augment": ("flip", True),
    "data.split_seed": (1, True),
    "data.val_fraction": (0.3, True),
    "data.test_fraction": (0.3, True),
    "data.train_per_class": (5, True),
    "data.official_val": (True, True),
    "data.cache_size": (8, True),
    "data.cache_dir": ("elsewhere", False),
    "data.content": ("60 images, 4 classes, sha256 0123456789abcdef", True),
    "optimizer.lr": (2e-3, True),
    "optimizer.weight_decay": (0.0, True),
    "optimizer.betas": ([0.999, 0.9], True),
    "optimizer.eps": (1e-6, True),
    "optimizer.decay_bias_and_norm": (False, True),
    "optimizer.schedule": ("cosine", True),
    "optimizer.warmup": (0.1, True),
    "optimizer.clip_norm": (1.0, True),
    "optimizer.label_smoothing": (0.1, True),
    "lora.method": ("full", True),
    "lora.rank": (8, True),
    "lora.alpha": (16.0, True),
    "lora.dropout": (0.1, True),
    "lora.targets": (["q", "v"], True),
    "lora.blocks": ([1], True),
    "lora.scaling": ("rslora", True),
    "lora.init": ("gaussian", True),
    "lora.bias": ("all", True),
    "trainer.epochs": (3, True),
    "trainer.precision": ("fp32", True),
    "trainer.accelerator": ("auto", False),
    "trainer.devices": ("2", False),
    "trainer.compile": (True, True),
    "trainer.resume": ("restart", False),
    "trainer.checkpoint_every": (1.0, False),
    "trainer.log_every": (7, False),
    "trainer.validate_every": (2, False),
    "seed": (1, True),
}


def ten_digits(values: dict) -> str:
    """The first digits of the sha256 over the sorted, dense JSON."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def test_the_canonical_form_is_what_is_hashed():
    assert canonical(plain_trial()) == CANONICAL
    assert trial_id(plain_trial()) == ten_digits(CANONICAL)
    without_seed = {key: value for key, value in CANONICAL.items() if key != "seed"}
    assert cell_id(plain_trial()) == ten_digits(without_seed)


def test_ids_on_disk_stay_what_they_are():
    assert trial_id(plain_trial()) == "2e18b1cf72"
    assert cell_id(plain_trial()) == "a8b665e937"


def test_the_table_has_every_setting():
    assert set(OTHER) == {f"{s}.{key}" for s, keys in PLAIN.items() if s != "seed" for key in keys} | {"seed"}


@pytest.mark.parametrize(("key", "value", "matters"), [(key, *other) for key, other in OTHER.items()])
def test_what_makes_another_trial(key, value, matters):
    other = plain_trial({key: value})
    assert (trial_id(other) != trial_id(plain_trial())) == matters
    assert (cell_id(other) != cell_id(plain_trial())) == (matters and key != "seed")


def test_two_spellings_of_one_trial():
    def id_of(**lora: object) -> str:
        return trial_id(plain_trial({f"lora.{key}": value for key, value in lora.items()}))

    assert id_of(targets=["fc2", "fc1", "o", "v", "k", "q"]) == id_of()
    assert id_of(targets=["v", "q"]) == id_of(targets=["q", "v"])
    assert id_of(blocks=[0, 1]) == id_of(blocks=[1, 0]) == id_of()
    assert len({id_of(blocks=[0]), id_of(blocks=[1]), id_of()}) == 3
    assert id_of(alpha=32) == id_of()


@pytest.mark.parametrize(
    ("given", "kept"), [([3, 1], [1, 3]), ([0, 1], [0, 1]), ([3, 2, 0], [0, 2, 3]), ([3, 1, 0, 2], None)]
)
def test_blocks_in_fixed_order_and_all_of_four_as_none(given, kept):
    assert canonical(plain_trial({"model.num_layers": 4, "lora.blocks": given}))["lora"]["blocks"] == kept


def test_a_baseline_has_no_adapters_settings():
    baseline = canonical(plain_trial({**BASELINE, "lora.method": "none"}))
    assert baseline["lora"] == {"method": "none", **{key.partition(".")[2]: None for key in BASELINE}}


def test_weights_count_by_their_content():
    """Which the configuration says itself: no file is read."""
    digest = hashlib.sha256(b"weights").hexdigest()
    by_content = {**CANONICAL["model"], "weights": f"sha256:{digest}"}
    expected = ten_digits({**CANONICAL, "model": by_content})
    for path in ("here/one.pth", "~/same.safetensors"):
        assert trial_id(plain_trial({"model.weights": path, "model.weights_sha256": digest})) == expected
    other = plain_trial({"model.weights": "here/one.pth", "model.weights_sha256": "0" * 64})
    assert trial_id(other) != expected
    with pytest.raises(ConfigError, match=r"^model\.weights_sha256 has no value: compose the trial, or give"):
        trial_id(plain_trial({"model.weights": "here/one.pth"}))


@pytest.mark.parametrize("what", ["size", "time", "file", "inside"])
def test_a_changed_file_is_read_again(what, tmp_path):
    """What tells that it was changed: size, time of writing, another file, or bytes under the old size and times."""
    path = tmp_path / "w.pth"
    path.write_bytes(b"before")
    before, earlier = path.stat(), file_sha256(path)
    assert earlier == hashlib.sha256(b"before").hexdigest()
    if what == "file":
        (tmp_path / "new").write_bytes(b"behind")
        os.replace(tmp_path / "new", path)
    else:
        path.write_bytes(b"longer than before" if what == "size" else b"behind")
    if what != "time":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest() != earlier


def test_a_file_that_cannot_be_read(tmp_path):
    absent = tmp_path / "w.pth"
    message = rf"^model\.weights={absent} cannot be read \(No such file or directory\): check the path$"
    with pytest.raises(ConfigError, match=message):
        file_sha256(absent)
    with pytest.raises(ConfigError, match=r"the folder has none of model\.safetensors, model\.safe"):
        file_sha256(tmp_path)


def test_a_folders_weights_count_by_content(tmp_path):
    """In one file as that file; in several by all of them, wherever the folder lies and whatever else is in it."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    assert file_sha256(tmp_path) == hashlib.sha256(b"weights").hexdigest()
    index = json.dumps({"weight_map": {"a": "1.bin", "b": "2.bin", "c": "1.bin"}})
    found = []
    for name, second in (("one", b"y"), ("two", b"y"), ("other", b"z")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_model.bin.index.json").write_text(index)
        (tmp_path / name / "1.bin").write_bytes(b"x")
        (tmp_path / name / "2.bin").write_bytes(second)
        found.append(file_sha256(tmp_path / name))
    assert found[0] == found[1] != found[2]
    (tmp_path / "two" / "2.bin").unlink()
    with pytest.raises(ConfigError, match=r"2\.bin cannot be read"):
        file_sha256(tmp_path / "two")


def test_a_file_is_read_once_and_in_blocks(tmp_path, monkeypatch):
    """A sweep of a thousand trials reads it once."""
    path = tmp_path / "w.pth"
    content = b"weights" * 500_000  # several blocks of a megabyte
    path.write_bytes(content)
    opened = []
    whole = type(path).open
    monkeypatch.setattr(type(path), "open", lambda self, *a, **k: opened.append(self) or whole(self, *a, **k))
    assert {file_sha256(path) for _ in range(5)} == {hashlib.sha256(content).hexdigest()}
    assert opened == [path]


@pytest.mark.parametrize(
    ("weights", "is_file"),
    [
        (None, False),
        ("IMAGENET1K_V1", False),
        ("pth", False),
        ("a.pth", True),
        ("a.pt", True),
        ("a.safetensors", True),
        ("a.bin", True),
        ("folder/a", True),
    ],
)
def test_a_path_or_a_name(weights, is_file):
    assert is_weights_file(weights) is is_file


def test_a_file_that_exists_is_a_file_whatever_its_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.ckpt").write_bytes(b"weights")
    (tmp_path / "folder").mkdir()
    assert is_weights_file("a.ckpt")
    assert not is_weights_file("b.ckpt")
    assert is_weights_file("folder")
