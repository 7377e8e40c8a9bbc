"""Trials whose images are decoded while they train give what those on a cache give, to the last bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import Recorder, contents, run_command, train_together, trial_config
from PIL import Image

from lora_vit.build import build_setup
from lora_vit.config import TrialConfig
from lora_vit.data.dataset import forget
from lora_vit.data.preprocessing import Decoding
from lora_vit.distributed import Process
from lora_vit.errors import Interrupted
from lora_vit.stopping import StopRequest
from lora_vit.training.loop import train_trials
from lora_vit.training.trial import TrialRun

STEPS, READ, HELD = 5, 7, 8  # steps of an epoch, images of a batch with the one to mix, those of val and of test
NOISY = ("data.augment=[crop_flip,randaugment,mixup]", "lora.dropout=0.2", "data.batch_size=6")


@pytest.fixture
def pets(tmp_path) -> Path:
    """Two classes of 24 photographs, a few of another kind."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder := tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(24):
            pixels = rng.integers(0, 256, (40 + i, 60 - i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02d}.{'png' if i % 5 == 4 else 'jpg'}")
    return tmp_path / "pets"


@pytest.fixture
def read(monkeypatch) -> Counter[bytes]:
    """How often each file has been decoded."""
    seen, whole = Counter[bytes](), Decoding.read
    monkeypatch.setattr(Decoding, "read", lambda own, file, find=False: seen.update([file]) or whole(own, file, find))
    return seen


def of_pets(pets: Path, kept: str, *overrides: str) -> TrialConfig:
    forget()
    fractions = "data.val_fraction=0.17", "data.test_fraction=0.17"
    places = f"data.root={pets}", f"data.cache_dir={pets.parent / 'cache'}"
    return trial_config("data=imagefolder", *places, *fractions, f"data.cache={kept}", *NOISY, *overrides)


@pytest.mark.parametrize("kept", ["none", "memory"])
def test_a_pack_that_shares_a_seed_shares_the_decoding(kept, pets, read, tmp_path):
    """And its records are those of a pack on a cache."""
    for where in ("disk", kept):
        configs = [of_pets(pets, where, f"lora.rank={rank}") for rank in (1, 2, 3)]
        setup = build_setup(configs[0], Process())
        read.clear()
        train_together(configs, tmp_path / where, setup)
    for k in range(3):
        assert contents(tmp_path / kept / str(k)) == contents(tmp_path / "disk" / str(k))
    # two epochs of training and validation, one test: once for the three
    assert read.total() == (2 * (STEPS * READ + HELD) + HELD if kept == "none" else 0)


def test_an_epoch_that_resumes_decodes_nothing_that_was_done(pets, read, tmp_path):
    config = of_pets(pets, "disk")
    train_together([config], tmp_path / "whole")
    setup = build_setup(config := of_pets(pets, "none"), Process())

    class Stopping(Recorder):
        def advance(self, pack):
            stop.signum = 15 if pack.step_of(pack.trials[0]) == STEPS + 3 else 0

    (tmp_path / "run").mkdir()
    with StopRequest() as stop:
        with pytest.raises(Interrupted):
            train_trials([TrialRun.open(config, tmp_path / "run", setup, {})], setup, Stopping(), stop)
        stop.signum = 0
        read.clear()
        train_trials([TrialRun.open(config, tmp_path / "run", setup, {})], setup, Recorder(), stop)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole" / "0")
    assert read.total() == 2 * READ + 2 * HELD


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_decode_each_its_own(pets, tmp_path):
    for kept in ("disk", "none"):
        places = f"data.root={pets}", f"data.cache_dir={tmp_path / 'cache'}", "data.augment=crop_flip"
        how = "data=imagefolder", f"data.cache={kept}", "data.batch_size=6", "trainer.devices=2"
        run_command(*places, *how, f"hydra.run.dir={kept}", cwd=tmp_path)
    assert contents(tmp_path / "none") == contents(tmp_path / "disk")
