"""Trial id and cell id against hashes computed here, from values written out here."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
from plain_trials import BASELINE, PLAIN, plain_trial

from lora_vit.config import ConfigError, canonical, cell_id, is_weights_file, trial_id

CANONICAL = {
    "model": PLAIN["model"],
    "data": {key: value for key, value in PLAIN["data"].items() if key not in ("root", "cache_dir")},
    "optimizer": PLAIN["optimizer"],
    "lora": PLAIN["lora"],
    "trainer": {"epochs": 2, "precision": "fp64", "compile": False},
    "seed": 0,
    "schema": 1,
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
    "model.head_dropout": (0.2, True),
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
    assert trial_id(plain_trial()) == "ddd4371a80"
    assert cell_id(plain_trial()) == "e29d979210"


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


def test_weights_count_by_their_content(tmp_path, monkeypatch):
    one, same, other = (tmp_path / name for name in ("one.pth", "same.safetensors", "other.pt"))
    content = b"weights" * 500_000  # several blocks of a megabyte
    one.write_bytes(content)
    same.write_bytes(content)
    other.write_bytes(b"others")
    by_content = {**PLAIN["model"], "weights": "sha256:" + hashlib.sha256(content).hexdigest()}
    expected = {**CANONICAL, "model": by_content}
    assert canonical(plain_trial({"model.weights": str(one)})) == expected
    assert trial_id(plain_trial({"model.weights": str(same)})) == ten_digits(expected)
    assert trial_id(plain_trial({"model.weights": str(other)})) != ten_digits(expected)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trial_id(plain_trial({"model.weights": "~/one.pth"})) == ten_digits(expected)


@pytest.mark.parametrize("what", ["size", "time", "file"])
def test_changed_weights_are_read_again(what, tmp_path):
    """What tells that a file was changed: its size, the time of writing, or that it is another file."""
    path = tmp_path / "w.pth"
    path.write_bytes(b"before")
    trial = plain_trial({"model.weights": str(path)})
    before, earlier = path.stat(), trial_id(trial)
    if what == "file":
        (tmp_path / "new").write_bytes(b"behind")
        os.replace(tmp_path / "new", path)
    else:
        path.write_bytes(b"behind" if what == "time" else b"longer")
        if what == "size":
            path.write_bytes(b"longer than before")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (what == "time")))
    assert trial_id(trial) != earlier


def test_weights_that_cannot_be_read(tmp_path):
    absent = tmp_path / "w.pth"
    message = rf"^model\.weights={absent} cannot be read \(No such file or directory\): check the path$"
    with pytest.raises(ConfigError, match=message):
        trial_id(plain_trial({"model.weights": str(absent)}))
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        trial_id(plain_trial({"model.weights": str(tmp_path)}))


def test_weights_are_read_once(tmp_path, monkeypatch):
    """A sweep of a thousand trials reads the file once."""
    path = tmp_path / "w.pth"
    path.write_bytes(b"weights")
    opened = []
    whole = type(path).open
    monkeypatch.setattr(type(path), "open", lambda self, *a, **k: opened.append(self) or whole(self, *a, **k))
    ids = {trial_id(plain_trial({"model.weights": str(path), "seed": seed})) for seed in range(5)}
    assert len(ids) == 5
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
    assert not is_weights_file("folder")


def make_images(root, files):
    for name, size in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * size)


FILES = {"b/2.png": 20, "b/1.png": 1, "a/9.png": 3, "top.txt": 0, "a/deep/z.png": 5}


def test_an_image_folder_counts_by_names_and_sizes(tmp_path, monkeypatch):
    make_images(tmp_path / "here", FILES)
    make_images(tmp_path / "there", dict(reversed(FILES.items())))
    changes = {"data.name": "imagefolder", "data.root": str(tmp_path / "here")}
    lines = ["top.txt\x000\n", "a/9.png\x003\n", "a/deep/z.png\x005\n", "b/1.png\x001\n", "b/2.png\x0020\n"]
    files = hashlib.sha256("".join(lines).encode()).hexdigest()
    expected = {**CANONICAL, "data": {**CANONICAL["data"], "name": "imagefolder", "files": files}}
    assert canonical(plain_trial(changes)) == expected
    assert trial_id(plain_trial({**changes, "data.root": str(tmp_path / "there")})) == ten_digits(expected)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trial_id(plain_trial({**changes, "data.root": "~/here"})) == ten_digits(expected)
    assert "files" not in canonical(plain_trial({"data.root": str(tmp_path / "here")}))["data"], "another data set"
    assert "files" not in canonical(plain_trial({"data.name": "imagefolder"}))["data"]
    make_images(tmp_path / "here", {"a/9.png": 4})
    assert trial_id(plain_trial(changes)) != ten_digits(expected)
    message = rf"^data\.root={tmp_path}/none is not a folder: give the folder that holds your class folders$"
    with pytest.raises(ConfigError, match=message):
        trial_id(plain_trial({**changes, "data.root": str(tmp_path / "none")}))


def test_folders_are_listed_in_one_order_on_every_disk(tmp_path, monkeypatch):
    """Disks list folders as they like."""
    make_images(tmp_path, FILES)
    trial = plain_trial({"data.name": "imagefolder", "data.root": str(tmp_path)})
    walk = os.walk

    def in_order(backwards):
        def listed(root):
            for folder, folders, files in walk(root):
                for names in (folders, files):
                    names.sort(reverse=backwards)
                yield folder, folders, files

        return listed

    ids = set()
    for backwards in (False, True):
        monkeypatch.setattr(os, "walk", in_order(backwards))
        ids.add(trial_id(trial))
    assert len(ids) == 1
