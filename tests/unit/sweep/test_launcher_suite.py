"""Hydra's own tests of a launcher, with task functions that cannot be packed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite
from hydra.version import setbase

import lora_vit
from lora_vit.compose import register_schema

pytestmark = [  # the suite's applications name no version
    pytest.mark.filterwarnings("ignore:Future Hydra versions"),
    pytest.mark.filterwarnings("ignore:\\s*version_base"),
]


@pytest.fixture(autouse=True)
def plugin_on_path(monkeypatch, hydra_restore_singletons):
    """In this process, and in those of the tests' applications."""
    register_schema()
    Plugins.instance()._initialize()  # Hydra looks for plugins once, perhaps before we were asked for
    setbase("1.1")  # what the suite's functions expect, where another test's command chose a newer one
    monkeypatch.setenv("PYTHONPATH", str(Path(lora_vit.__file__).parent / "plugins"))


def test_discovery():
    names = [cls.__name__ for cls in Plugins.instance().discover(Launcher)]
    assert "PackedLauncher" in names


@pytest.mark.parametrize(("launcher_name", "overrides"), [("packed", [])])
class TestPackedLauncher(LauncherTestSuite):
    """As Hydra tests its launchers."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({}, ["-m", "hydra/launcher=packed"])],
)
class TestPackedLauncherIntegration(IntegrationTestSuite):
    """As Hydra tests its launchers with applications."""
