"""Installed from a built wheel in a fresh environment; the README's snippet."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_built_wheel_trains_from_any_folder(project_root: Path, tmp_path: Path):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "w")]
    # a copy: building leaves folders beside the source
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(project_root), str(source)], check=True)
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = (tmp_path / "w").glob("*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    # the dependencies of this environment, but not its lora_vit
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    python, cwd = str(venv / "bin" / "python"), tmp_path / "elsewhere"
    cwd.mkdir()
    where = subprocess.run(
        [python, "-c", "import lora_vit; print(lora_vit.__file__)"], cwd=cwd, capture_output=True, text=True, check=True
    )
    assert where.stdout.startswith(str(site))
    script = (
        "import sys; from importlib.metadata import distribution; sys.argv[0] = 'lora-vit'\n"
        "if __name__ == '__main__':\n"
        "    distribution('lora-vit').entry_points.select(name='lora-vit')['lora-vit'].load()()"
    )
    for arguments, last in (
        (["train", "experiment=quickstart", "trainer.epochs=1", "hydra.run.dir=run"], "Validation Accuracy: "),
        (["evaluate", "run", "--split", "val"], "Val Accuracy: "),
    ):
        line = [python, "-c", script, *arguments]
        done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith(last)


def test_the_readmes_snippet_runs_as_it_stands(project_root: Path, tmp_path: Path):
    readme = (project_root / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    check = (
        "\ntrained = [n for n, p in model.named_parameters() if p.requires_grad]"
        "\nassert len(trained) == 12 * 4 * 2 + 2, len(trained)  # qkv, out, fc1, fc2: A and B in 12 blocks; the head"
        "\nassert all('lora_' in n or n.startswith('heads.head') for n in trained)"
        "\nassert sum('self_attention' in n for n in trained) > 0 and sum('lora' in n for n in trained) > 0"
        "\nfrom safetensors.torch import load_file"
        "\nsaved = load_file('my_adapter/adapter.safetensors')"
        "\nassert len(saved) == 12 * 6 * 2 + 2 and all(t.any() for n, t in saved.items() if n.endswith('lora_B'))"
    )
    subprocess.run([sys.executable, "-c", snippet + check], cwd=tmp_path, check=True, timeout=120)
