"""What other versions of this project wrote is read, with the ids that it has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from plain_trials import BASELINE, PLAIN, composed, plain_trial, plain_values

from lora_vit.config import WITHOUT_IDENTITY, canonical, from_dict, identity, ids, schema, to_dict
from lora_vit.errors import ConfigError
from lora_vit.records import read_record

EARLIER = Path(__file__).parents[2] / "data" / "earlier"
"""The record of ``experiment=quickstart trainer.epochs=1 trainer.accelerator=cpu`` as c28667a wrote it."""
IDS = {  # as c28667a had them
    "experiment=quickstart": ("86c25261b1", "1ce8b43747"),
    "experiment=quickstart lora=none": ("2c53b9daa1", "5a2b9f650b"),
    "experiment=quickstart lora=full": ("34eb2ebadf", "47b4a35c96"),
    "experiment=quickstart lora=qv lora.scaling=rslora lora.bias=all lora.blocks=[1,0]": ("0bb16fe280", "4de038ff1e"),
    "model=timm data=digits": ("d7c9dab73f", "713f167359"),
    "model=vit_h_14 data=cifar100": ("6dc6728aa3", "a92db3d034"),
    "model=vit_l_32 lora=qv": ("23a85e929f", "4400b0ce56"),
}


def test_a_record_on_disk_is_read_and_is_of_the_trial_that_it_was():
    record, written = read_record(EARLIER), json.loads((EARLIER / "record.json").read_text())
    trial = from_dict(composed("experiment=quickstart", "trainer.epochs=1", "trainer.accelerator=cpu"))
    assert record.config == to_dict(trial)
    assert ids(trial) == (written["trial_id"], written["cell_id"]) == ("3151de5e50", "d42759eff9")
    for name in (*WITHOUT_IDENTITY, "model.weights_sha256"):
        section, _, key = name.partition(".")
        written["config"][section].pop(key, None)  # a later version may have added it
    assert canonical(trial) == {**written["config"], "schema": written["schema"]}


@pytest.mark.parametrize(("line", "expected"), IDS.items())
def test_ids_stay(line, expected):
    assert ids(from_dict(composed(*line.split()))) == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora.init": "kaiming_uniform", "optimizer.decay_bias_and_norm": True}, None),
        ({**BASELINE, "lora.method": "none", "lora.init": None}, None),
        ({"lora.init": "gaussian"}, "lora.init=gaussian is of an earlier version, this one has only kaiming_uniform"),
        ({"optimizer.decay_bias_and_norm": False}, "optimizer.decay_bias_and_norm=false is of an earlier version"),
    ],
)
def test_a_setting_that_was_removed_is_read_at_the_value_that_is_left(changes, says):
    if says is None:
        now = {key: value for key, value in changes.items() if key in BASELINE or key == "lora.method"}
        assert plain_trial(changes) == plain_trial(now)
    else:
        with pytest.raises(ConfigError, match=says):
            plain_trial(changes)


@pytest.fixture
def later(monkeypatch):
    """The schema of a later version, in which adapters have a flavour; "plain" is what they were before."""
    field = "    flavour: str | None = field(metadata=choice('plain', 'rich') | {'as_before': 'plain'})\n"
    source = Path(schema.__file__).read_text().replace("    bias: str | None", field + "    bias: str | None")
    module = ModuleType("later_schema")
    monkeypatch.setitem(sys.modules, "later_schema", module)
    exec(compile(source, "later_schema", "exec"), vars(module))
    monkeypatch.setattr(identity, "deciding", module.deciding)
    return module


def test_a_setting_that_is_added_is_no_part_of_the_identity_at_the_value_that_means_as_before(later):
    earlier = later.from_dict(PLAIN)
    assert earlier.lora.flavour == "plain"
    assert earlier == later.from_dict(plain_values({"lora.flavour": "plain"}))
    assert ids(earlier) == ids(plain_trial()) == ("2e18b1cf72", "a8b665e937")
    assert len({*ids(earlier), *ids(later.from_dict(plain_values({"lora.flavour": "rich"})))}) == 4
    baseline = {**BASELINE, "lora.method": "none"}  # which has no value of an adapters' setting
    earlier = later.from_dict(plain_values(baseline))
    assert earlier.lora.flavour is None
    assert ids(earlier) == ids(plain_trial(baseline))
