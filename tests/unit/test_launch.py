"""What the processes get that a command starts for one trial."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from plain_trials import BASELINE, plain_trial
from torch.distributed.launcher import api as launcher

from lora_vit import run
from lora_vit.errors import ConfigError

ODD = "it's \"a\", b\\'${m} \u2028猫\r\ns\tt "


@pytest.mark.parametrize(
    "changes",
    [
        {"lora.targets": ["q", "fc1"], "lora.blocks": [1, 0], "optimizer.eps": 1e-05, "data.root": ODD},
        {"seed": 7, "trainer.compile": True, "lora.alpha": 0.1, "data.cache_dir": ODD},
        {"lora.method": "none"} | BASELINE,
    ],
)
def test_they_train_the_trial_that_was_composed(changes, tmp_path, monkeypatch):
    config, files, trained, argv = plain_trial(changes), {"config.yaml": ODD}, [], ["train", ODD]

    def started(*command):
        monkeypatch.setattr(sys, "argv", ["run.py", command[-1]])
        monkeypatch.setattr(run, "train", lambda *given: trained.append((*given, sys.argv)))
        run.main()

    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(launcher, "elastic_launch", lambda options, program: started)
    monkeypatch.setattr(run, "read_record", str)
    assert run.launch(config, tmp_path, files, 2) == str(tmp_path)
    assert trained == [(config, tmp_path, files, argv)]


def test_processes_are_started_from_the_main_thread_alone(tmp_path):
    with ThreadPoolExecutor() as other, pytest.raises(ConfigError, match=r"trainer\.devices=2: .* so give 1"):
        other.submit(run.launch, plain_trial({"trainer.devices": "2"}), tmp_path, {}, 2).result()
