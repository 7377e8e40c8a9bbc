"""Which trial a configuration is: its canonical form, trial id and cell id, with files by their content.

A composed configuration says itself what its files contain, so that none is read to know which trial it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from lora_vit.config.schema import SCHEMA_VERSION, TARGETS, TrialConfig, deciding
from lora_vit.errors import ConfigError

FOLDER_FILES = tuple(
    name + index for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)
"""Of what ``save_pretrained`` writes, the first that is there is taken."""


def canonical(trial: TrialConfig) -> dict[str, Any]:
    """What decides a trial's numbers, in one fixed form: no paths, files by content, targets in fixed order."""
    values = deciding(trial)
    if trial.lora.targets is not None:
        values["lora"]["targets"] = [t for t in TARGETS if t in trial.lora.targets]
    if trial.lora.blocks is not None:
        blocks = sorted(trial.lora.blocks)
        values["lora"]["blocks"] = None if blocks == list(range(trial.model.num_layers or 0)) else blocks
    digest = values["model"].pop("weights_sha256")
    if digest is not None:
        values["model"]["weights"] = "sha256:" + digest
    elif is_weights_file(trial.model.weights):
        raise ConfigError("model.weights_sha256 has no value: compose the trial, or give the file's sha256")
    values["schema"] = SCHEMA_VERSION
    return values


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def trial_id(trial: TrialConfig) -> str:
    """First 10 hex digits of the sha256 over the canonical config."""
    return ids(trial)[0]


def cell_id(trial: TrialConfig) -> str:
    """The trial id without the seed: trials of one cell are repeats of each other."""
    return ids(trial)[1]


def ids(trial: TrialConfig) -> tuple[str, str]:
    """Trial id and cell id."""
    values = canonical(trial)
    whole = _digest(values)
    del values["seed"]
    return whole, _digest(values)


def is_weights_file(weights: str | None) -> bool:
    """Whether ``model.weights`` is a path rather than the name of published weights; what exists is one."""
    if weights is None:
        return False
    return weights.endswith((".pth", ".pt", ".bin", ".safetensors")) or "/" in weights or Path(weights).exists()


def weights_files(path: Path) -> list[Path]:
    """The file itself, or those in which a folder of ``save_pretrained`` has the weights. Raises ConfigError."""
    if not path.is_dir():
        return [path]
    there = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    if not there:
        raise ConfigError(f"model.weights={path}: the folder has none of {', '.join(FOLDER_FILES)}")
    if there[0].suffix != ".json":
        return there[:1]
    try:
        parts = json.loads(there[0].read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({path / Path(part).name for part in parts})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(f"model.weights={there[0]} is damaged: get it again") from None


def file_sha256(path: Path) -> str:
    """Sha256 of a file's bytes, read once while it stays as it is; of a folder's files if the weights are in several.

    Raises ConfigError where they cannot be read.
    """
    digests = []
    for file in weights_files(path):
        try:
            stat = file.stat()
            digests.append(_sha256(file, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)))
        except OSError as error:
            raise ConfigError(f"model.weights={file} cannot be read ({error.strerror}): check the path") from None
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, version: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
