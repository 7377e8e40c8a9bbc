"""Fixtures that every test may use."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: the workers share the cores, also their commands
    os.environ.setdefault("OMP_NUM_THREADS", "1")

for told_to_ignore in (signal.SIGINT, signal.SIGHUP):  # behind `&` or nohup; the commands under test would inherit it
    if signal.getsignal(told_to_ignore) is signal.SIG_IGN:
        signal.signal(told_to_ignore, lambda *_: None)


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The checkout's top folder."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def fake_cuda() -> None:
    """Fake tensors on "cuda" without a GPU, which torch had to learn."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            torch.ones(1).to("cuda")
    except RuntimeError:
        pytest.skip(f"torch {torch.__version__} needs a driver to move fake tensors to cuda")


@pytest.fixture(scope="session")
def tiny_imagenet_zip(project_root: Path) -> Path:
    """Real Tiny-ImageNet images (a subset in the original layout), where they lie beside the checkout."""
    path = project_root.parent / "shared" / "data" / "tiny-imagenet-200-subset.zip"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the checkout")
    return path


def installed(path: str) -> Path:
    if not Path(path).is_dir():
        pytest.skip(f"{path} is not there: .ci/run installs it")
    return Path(path)


@pytest.fixture(scope="session")
def openclipart() -> Path:
    """8,121 drawings of 22 classes, nested, unbalanced, most of them transparent (Debian's openclipart-png)."""
    return installed("/usr/share/openclipart/png")


@pytest.fixture(scope="session")
def emojis() -> list[Path]:
    """The same 1,911 emojis of 10 classes in two styles, with a table of each (npm's emoji-datasource-*)."""
    return [installed(f"/usr/lib/node_modules/emoji-datasource-{style}") for style in ("google", "twitter")]


@pytest.fixture
def hands(monkeypatch) -> SimpleNamespace:
    """The clock of bars and lines, which stands at what the test sets."""
    from lora_vit import terminal

    hands = SimpleNamespace(now=100.0)
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: hands.now, perf_counter=lambda: hands.now))
    return hands


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process, None for ``lora-vit`` itself; its exit code and what it printed."""
    from lora_vit import cli

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which `train` sets

    def run(command: str | None, *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora-vit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run
