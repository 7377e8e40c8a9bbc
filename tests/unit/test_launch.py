"""A config as a command line that Hydra reads back to the last character."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from plain_trials import BASELINE, plain_trial

from lora_vit.compose import Composer, initialized, refuse_misread_paths
from lora_vit.config import to_dict
from lora_vit.errors import ConfigError
from lora_vit.resolve import from_omegaconf
from lora_vit.run import launch, overrides_of

PATHS = [
    "a b", "a,b", "it's", "a\\", "\\'b\\\\'", '"c"', "'d'", "2024_11", "null", "true", "[e]", "{f: 1}", "(g)", "~h",
    "i=j", "k#l?*%", "${m}", "\\${n}", "o${p", "$q", "${oc.env:HOME}", "ü\u2028猫", "r\ns\tt", " u ",
]  # fmt: skip


def composed(overrides):
    refuse_misread_paths(overrides)
    with initialized():
        return Composer("config", []).exactly(overrides)


@pytest.mark.parametrize("path", PATHS)
def test_odd_paths(path):
    config = plain_trial({"data.root": path, "data.cache_dir": path})
    found = composed(overrides_of(config))
    assert (found.data.root, found.data.cache_dir) == (path, path)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora.targets": ["q", "fc1"], "lora.blocks": [1, 0], "optimizer.eps": 1e-05},
        {"seed": 7, "trainer.devices": "2", "trainer.compile": True, "lora.alpha": 0.1},
        {"lora.method": "none"} | BASELINE,
    ],
)
def test_a_whole_config(changes):
    config = plain_trial({"data.cache_dir": "/cache", **changes})
    assert to_dict(from_omegaconf(composed(overrides_of(config)))) == to_dict(config)


def test_processes_are_started_from_the_main_thread_alone(tmp_path):
    with ThreadPoolExecutor() as other, pytest.raises(ConfigError, match=r"trainer\.devices=2: .* so give 1"):
        other.submit(launch, plain_trial({"trainer.devices": "2"}), tmp_path, 2).result()
