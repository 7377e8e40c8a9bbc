"""Which trial a configuration is: its canonical form and ids. It says itself what its files contain: none is read."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from lora_vit.config.schema import SCHEMA_VERSION, TARGETS, TrialConfig, deciding
from lora_vit.errors import ConfigError
from lora_vit.files import user_path

FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json",
                "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
                "adapter.safetensors", "adapter_model.safetensors", "adapter_model.bin")  # fmt: skip


def canonical(trial: TrialConfig) -> dict[str, Any]:
    """What decides a trial's numbers, in one fixed form: no paths, files by content, targets in fixed order."""
    values = deciding(trial)
    if trial.lora.targets is not None:
        values["lora"]["targets"] = [t for t in TARGETS if t in trial.lora.targets]
    if trial.lora.blocks is not None:
        blocks = sorted(trial.lora.blocks)
        values["lora"]["blocks"] = None if blocks == list(range(trial.model.num_layers or 0)) else blocks
    names = trial.data.augmentations()
    values["data"]["augment"] = names[0] if len(names) == 1 else names
    if (digest := values["model"].pop("weights_sha256")) is not None:
        values["model"]["weights"] = f"sha256:{digest}{file_and_prefix(trial.model.weights)[1]}"
    elif is_weights_file(trial.model.weights):
        raise ConfigError("model.weights_sha256 has no value: compose the trial, or give the file's sha256")
    return {**values, "schema": SCHEMA_VERSION}


def ids(trial: TrialConfig) -> tuple[str, str]:
    """Trial id and cell id: the sha256 over the canonical config, and without its seed (of repeats of each other)."""
    values = canonical(trial)
    cell = {key: value for key, value in values.items() if key != "seed"}
    texts = [json.dumps(part, sort_keys=True, separators=(",", ":")) for part in (values, cell)]
    whole, without_seed = (hashlib.sha256(text.encode()).hexdigest()[:10] for text in texts)
    return whole, without_seed


def trial_id(trial: TrialConfig) -> str:
    return ids(trial)[0]


def file_and_prefix(weights: object) -> tuple[str, str]:
    """The parts of FILE::PREFIX, which takes one of several models in a file: ``FILE``, and ``::PREFIX`` or nothing."""
    file, colons, prefix = str(weights).partition("::")
    return file, colons + prefix


def is_weights_file(weights: str | None) -> bool:
    """Whether ``model.weights`` is a path, or FILE::PREFIX of a model in it, rather than a name; what exists is one."""
    path = file_and_prefix(weights or "")[0]
    suffixes = (".pth", ".pt", ".bin", ".safetensors", ".npz")
    return weights is not None and (path.endswith(suffixes) or "/" in path or Path(path).exists())


def weights_files(weights: str | Path) -> list[Path]:
    """The file itself, or those in which a folder of ``save_pretrained`` has the weights. Raises ConfigError."""
    path = user_path(file_and_prefix(weights)[0])
    if not path.is_dir():
        return [path]
    file = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)  # the first that is there
    if file is None:
        remedy = "fetch them too, with shards (*-of-*) their index"
        raise ConfigError(f"model.weights={path}: the folder has none of {', '.join(FOLDER_FILES[:4])}: {remedy}")
    if file.suffix != ".json":
        return [file]
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({path / Path(part).name for part in parts})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(f"model.weights={file} is damaged: get it again") from None


def file_sha256(path: str | Path) -> str:
    """Sha256 of a file, read once while it stays as it is, or of a folder's files together. Raises ConfigError."""
    digests = []
    try:
        for file in weights_files(path):
            stat = file.stat()
            digests.append(_sha256(file, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)))
    except OSError as error:
        name = error.filename or path
        hint = "check the path (of Hugging Face's hub give hf_hub:ORG/NAME, or a folder with the files)"
        raise ConfigError(f"model.weights={name} cannot be read ({error.strerror}): {hint}") from None
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, version: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
