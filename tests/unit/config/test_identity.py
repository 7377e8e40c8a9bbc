"""Trial id and cell id against hashes computed here, and what is part of them."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import pytest
from plain_trials import BASELINE, PLAIN, plain_trial

from lora_vit.config import SECTIONS, WITHOUT_IDENTITY, canonical, file_sha256, ids, is_weights_file, trial_id
from lora_vit.errors import ConfigError

ELSEWHERE = {"data.root", "data.cache", "data.cache_dir", "trainer.accelerator", "trainer.devices", "trainer.resume",
             "trainer.checkpoint_every", "trainer.log_every", "trainer.validate_every", "trainer.micro_batch",
             "trainer.checkpoint_activations", "trainer.deterministic", "trainer.metric", "data.labels", "data.images",
             "data.image_column", "data.label_column", "data.split_column", "data.target"}  # fmt: skip
"""Written out once more: a setting that moves into or out of the identity changes the ids of trials on disk."""
AS_BEFORE = {"data.dataset", "data.background", "data.value_range", "data.random_erasing_p", "data.mixup_alpha",
             "data.cutmix_alpha",
             "data.randaugment_num_ops", "data.randaugment_magnitude", "data.color_jitter_brightness",
             "data.color_jitter_contrast", "data.color_jitter_saturation", "data.color_jitter_hue",
             "data.train_examples", "data.group", "data.on_broken",
             "optimizer.name", "optimizer.momentum",
             "optimizer.head_lr", "optimizer.lora_b_lr_ratio", "optimizer.class_weights", "lora.cut"}  # fmt: skip
"""Added later, and in the small trial at the value that means as before."""
CANONICAL: dict[str, Any] = {
    "model": {key: value for key, value in PLAIN["model"].items() if key != "weights_sha256"},
    "data": {key: value for key, value in PLAIN["data"].items() if f"data.{key}" not in ELSEWHERE | AS_BEFORE},
    "optimizer": {key: value for key, value in PLAIN["optimizer"].items() if f"optimizer.{key}" not in AS_BEFORE}
                 | {"decay_bias_and_norm": True},
    "lora": {key: value for key, value in PLAIN["lora"].items() if key != "cut"} | {"init": "kaiming_uniform"},
    "trainer": {"epochs": 2, "precision": "fp64", "compile": False},
    "seed": 0,
    "schema": 3,
}
SETTINGS = [(f"{section}.{key}", value) for section, keys in PLAIN.items() if section in SECTIONS
            for key, value in keys.items()]  # fmt: skip
OTHERS = {"data.group": 1, "data.train_examples": 4,
          "lora.blocks": [1], "model.mean": [0.5], "model.std": [0.5], "data.value_range": [0.0, 1.0],
          "optimizer.clip_norm": 1.0, "optimizer.head_lr": 1.0, "data.augment": ["mixup"]}
"""Another value of a setting where :func:`another` would give none that counts."""


def ten_digits(values: dict) -> str:
    """The first digits of the sha256 over the sorted, dense JSON."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def test_the_canonical_form_is_what_is_hashed():
    assert canonical(plain_trial()) == CANONICAL
    assert trial_id(plain_trial()) == ten_digits(CANONICAL) == "2e18b1cf72"
    without_seed = {key: value for key, value in CANONICAL.items() if key != "seed"}
    assert ids(plain_trial())[1] == ten_digits(without_seed) == "a8b665e937"
    assert set(WITHOUT_IDENTITY) == ELSEWHERE


def another(key: str, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return OTHERS.get(key, value[:1] if isinstance(value, list) else "another")


@pytest.mark.parametrize(("key", "value"), [*SETTINGS, ("seed", 0)])
def test_what_makes_another_trial(key, value):
    other, matters = plain_trial({key: another(key, value)}), key not in ELSEWHERE
    assert (trial_id(other) != trial_id(plain_trial())) == matters
    assert (ids(other)[1] != ids(plain_trial())[1]) == (matters and key != "seed")


def test_spellings_of_one_trial():
    def id_of(**lora: object) -> str:
        return trial_id(plain_trial({f"lora.{key}": value for key, value in lora.items()}))

    assert id_of(targets=["fc2", "fc1", "o", "v", "k", "q"]) == id_of(alpha=32) == id_of(blocks=[1, 0]) == id_of()
    assert id_of(targets=["v", "q"]) == id_of(targets=["q", "v"])
    one, several = ([plain_trial({"data.augment": names}) for names in kinds]
                    for kinds in (("flip", ["flip"]), (["flip", "mixup"], ["mixup", "flip"])))  # fmt: skip
    assert len({trial_id(trial) for trial in one}) == len({trial_id(trial) for trial in several}) == 1
    weights = [plain_trial({"optimizer.class_weights": w}) for w in ([1, 2], (1.0, 2.0))]
    assert len({trial_id(trial) for trial in weights}) == 1
    kept = canonical(plain_trial({"model.num_layers": 4, "lora.blocks": [3, 2, 0]}))["lora"]["blocks"]
    assert kept == [0, 2, 3]


def test_a_baseline_has_no_adapters_settings():
    baseline = canonical(plain_trial({**BASELINE, "lora.method": "none"}))
    assert baseline["lora"] == {**dict.fromkeys(CANONICAL["lora"]), "method": "none"}


def test_weights_count_by_their_content():
    """Which the configuration says itself: no file is read."""
    digest = hashlib.sha256(b"weights").hexdigest()
    by_content = {**CANONICAL["model"], "weights": f"sha256:{digest}"}
    expected = ten_digits({**CANONICAL, "model": by_content})
    for path in ("here/one.pth", "~/same.safetensors"):
        assert trial_id(plain_trial({"model.weights": path, "model.weights_sha256": digest})) == expected
    for weights, other in (("here/one.pth", "0" * 64), ("here/one.pth::teacher", digest)):
        assert trial_id(plain_trial({"model.weights": weights, "model.weights_sha256": other})) != expected
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


def test_the_model_in_a_file_is_no_part_of_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"weights")
    assert is_weights_file("w.pth::teacher")
    assert file_sha256(tmp_path / "w.pth::teacher") == hashlib.sha256(b"weights").hexdigest()


def test_a_file_that_cannot_be_read(tmp_path):
    absent = tmp_path / "w.pth"
    with pytest.raises(ConfigError, match=rf"^model\.weights={absent} cannot be read \(No such .*: check the path "):
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
    for name, second in (("one", "y"), ("two", "y"), ("other", "z")):
        (tmp_path / name).mkdir()
        for file, text in {"pytorch_model.bin.index.json": index, "1.bin": "x", "2.bin": second}.items():
            (tmp_path / name / file).write_text(text)
        found.append(file_sha256(tmp_path / name))
    parts = "".join(hashlib.sha256(part).hexdigest() for part in (b"x", b"y"))
    assert found[0] == found[1] == hashlib.sha256(parts.encode()).hexdigest() != found[2]
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


NAMES = ((None, False), ("IMAGENET1K_V1", False), ("pth", False), ("b.ckpt", False), ("a.ckpt", True), ("a.pth", True),
         ("a.pt", True), ("a.safetensors", True), ("a.bin", True), ("folder/a", True), ("folder", True))  # fmt: skip


@pytest.mark.parametrize(("weights", "is_file"), NAMES)
def test_a_path_or_a_name(weights, is_file, tmp_path, monkeypatch):
    """By its suffix, or because it exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.ckpt").write_bytes(b"weights")
    (tmp_path / "folder").mkdir()
    assert is_weights_file(weights) is is_file
