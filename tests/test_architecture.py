"""Modules import only lower levels, and heavy packages stay where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lora_vit"

LEVELS = [  # lowest first; a module imports only from lower levels, or from its own folder
    {"errors", "files", "config", "records", "stopping", "terminal", "randomness", "distributed"},
    {"lora", "models", "data", "analysis"},
    {"training"},
    {"build"},
    {"launch", "run", "commands", "interop"},
    {"sweep"},
    {"compose"},
    {"train", "evaluate", "predict", "merge", "export", "summarize", "hydra_callbacks"},
    {"api", "plugins"},
]
INSIDE_A_LEVEL = {("models", "lora"), ("records", "config"), ("distributed", "stopping"),
                  *((name, "errors") for name in ("files", "config", "records", "stopping", "distributed")),
                  ("records", "files"), ("run", "launch")}  # fmt: skip
ONLY_IN = {
    "hydra": {"api", "compose", "train", "hydra_callbacks", "plugins"},
    "omegaconf": {"api", "compose", "train", "hydra_callbacks", "plugins"},
    "pandas": {"analysis", "summarize"},
    "torch.utils.tensorboard": {"training"},
}


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
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
def test_no_upward_import(path):
    own = unit(path)
    for name in imports(path):
        if not name.startswith("lora_vit."):
            continue
        other = name.split(".")[1]
        if other == own or (own, other) in INSIDE_A_LEVEL or other not in LEVEL_OF:
            continue
        assert LEVEL_OF[other] < LEVEL_OF[own], f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_stay_where_they_belong(path):
    for name in imports(path):
        for package, allowed in ONLY_IN.items():
            if name == package or name.startswith(package + "."):
                assert unit(path) in allowed, f"{unit(path)} imports {name}"


def test_every_module_has_a_level():
    assert {unit(p) for p in FILES} <= set(LEVEL_OF)


@pytest.mark.parametrize("unit_name", ["config", "records", "analysis", "summarize", "hydra_callbacks"])
def test_torch_stays_out_of_what_only_reads(unit_name):
    for path in FILES:
        if unit(path) == unit_name:
            assert not [n for n in imports(path) if n == "torch" or n.startswith("torch.")]
