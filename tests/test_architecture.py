"""Modules import only lower levels, and heavy packages stay where they belong."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lora_vit"

LEVELS = [  # lowest first; a module imports only from lower levels, or from its own folder
    {"errors", "metrics"},
    {"files", "stopping", "randomness", "terminal"},
    {"config", "distributed"},
    {"records"},
    {"lora", "data", "analysis"},
    {"models"},
    {"training"},
    {"build"},
    {"run", "resolve", "trained", "cli"},
    {"sweep", "interop"},
    {"compose", "evaluate", "predict", "merge", "export"},
    {"cut"},
    {"api"},
    {"train", "fetch", "summarize", "track", "plugins"},
]
ONLY_IN = {
    "hydra": {"api", "compose", "train", "plugins"},
    "omegaconf": {"api", "compose", "resolve", "train", "plugins", "sweep"},
    "pandas": {"analysis", "data", "summarize"},
    "torch": {"build", "data", "distributed", "interop", "lora", "models", "predict", "randomness", "run", "sweep",
              "trained", "training"},
    "torch.utils.tensorboard": {"training"},
}  # fmt: skip


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, top: bool = False) -> set[str]:
    """What a file imports; ``top``: when it is imported itself."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
LEVEL_OF = {name: i for i, names in enumerate(LEVELS) for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_lower_ones_and_heavy_packages_where_they_belong(path):
    own = unit(path)
    for name in imports(path):
        project, other = [*name.split("."), ""][:2]
        if project == "lora_vit" and other in LEVEL_OF and other != own:
            assert LEVEL_OF[other] < LEVEL_OF[own], f"{own} imports {other}"
        for package, allowed in ONLY_IN.items():
            assert own in allowed or not f"{name}.".startswith(f"{package}."), f"{own} imports {name}"


@pytest.mark.parametrize("folder", sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "plugins"))
def test_a_folders_files_import_downwards(folder):
    """No circle: each file can be put above all that it imports at the top of the file."""
    files = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in (PACKAGE / folder).rglob("*.py")}
    below = {
        name: {other.removeprefix("lora_vit.") for other in imports(path, top=True)} & set(files) - {name}
        for name, path in files.items()
        if path.name != "__init__.py"
    }
    circle: list[str] = []
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert circle == []


def test_every_module_has_a_level():
    assert {unit(p) for p in FILES} == set(LEVEL_OF)
