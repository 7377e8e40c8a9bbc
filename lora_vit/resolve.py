"""From a composed OmegaConf node to a typed, validated trial that knows which files it uses."""

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import omegaconf
from omegaconf import MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_vit.config import DATASETS, SECTIONS, TrialConfig, file_sha256, from_dict, is_weights_file, trial_id, validate
from lora_vit.config.identity import weights_files
from lora_vit.config.schema import idle, unknown_key
from lora_vit.data.dataset import known_content
from lora_vit.errors import ConfigError, one_line
from lora_vit.files import user_path
from lora_vit.training.trackers import maker

UNKNOWN_ID = "TRIAL"  # stands for a trial id in a path, while that would need a download to know
SECTIONS_BESIDE = ("hydra", "sweep", "engine", "tracker")


def register_resolvers() -> None:
    """Make the interpolations known that ``conf/`` uses. They read nothing but what is composed, and fetch nothing."""
    is_old = omegaconf.__version__.startswith("2.3")  # a later one has another name for it
    new: Any = OmegaConf.register_new_resolver if is_old else OmegaConf.register_resolver
    for name, resolver in (("trial_id", _known_trial_id), ("rank_times", _rank_times), ("at_least", _at_least),
                           ("first", lambda *values: next((v for v in values if v is not None), None))):  # fmt: skip
        new(name, resolver, replace=True)


def _known_trial_id(_root_: Any) -> str:
    with contextlib.suppress(ConfigError):  # whoever uses the path says what is wrong
        trial = from_omegaconf(_root_, {}, fetch=False)
        return trial_id(trial) if is_identified(trial) else UNKNOWN_ID
    return UNKNOWN_ID


def _at_least(*sizes: Any, _root_: Any) -> Any:
    """The largest of some sizes in pixels; null is the model's own, which timm knows."""
    known = [int(size) for size in sizes if size is not None]
    if len(known) < len(sizes) and _root_.model.library == "timm":
        with contextlib.suppress(ImportError):  # whoever makes the model says what to install
            from timm.models import get_pretrained_cfg

            own = get_pretrained_cfg(_root_.model.name)
            known += own.input_size[1:] if own else []
    return max(known)


def _rank_times(scaling: Any, _parent_: Any) -> Any:
    """``lora.alpha=${rank_times:2}``: alpha tied to the rank, so that alpha / rank is the same for all ranks."""
    if "rank" not in _parent_:  # in a preset's hydra.sweeper.params, which Hydra resolves before there are trials
        return f"${{rank_times:{scaling}}}"
    return None if _parent_.rank is None else scaling * _parent_.rank


def from_omegaconf(cfg: Any, dropped: dict[str, str] | None = None, fetch: bool = True, cwd: Path | None = None
                   ) -> TrialConfig:  # fmt: skip
    """The plain, validated dataclass of a composed config, without what is composed beside a trial.

    ``dropped``: in a sweep, gets the settings without effect, and why; else they are refused. ``fetch``: download and
    read what decides the identity, else see :func:`is_identified`. ``cwd``: where relative paths begin, if not here.
    Raises ConfigError.
    """
    wanted = [*SECTIONS, "seed", "tracker"]
    plain: dict[str, Any] = {}
    for key in cfg:
        if key not in (*wanted, *SECTIONS_BESIDE):
            raise ConfigError(unknown_key(key))
    for key in wanted:
        if key not in cfg.keys():  # noqa: SIM118  (``in cfg`` asks for a value)
            raise ConfigError(f"{key} has no value: leave '~{key}' out")
        try:
            plain[key] = node = cfg[key]
            if OmegaConf.is_config(node):
                plain[key] = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            preset = ", or begin a preset of your own with `defaults: [NAME]`" * (len(OmegaConf.missing_keys(node)) > 1)
            raise ConfigError(f"{(k := error.full_key)} has no value: give one, for example {k}=...{preset}") from None
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).splitlines()[0]) from None
    trial = from_dict(plain)
    if dropped is not None:
        for key, (resting, here) in idle(trial).items():
            section, name = key.split(".")
            if (given := getattr(getattr(trial, section), name)) != resting:
                setattr(getattr(trial, section), name, resting)
                dropped[key] = here
                if key == "optimizer.head_lr":  # a probe's only rate
                    trial.optimizer.lr = given
    model, data, cwd = trial.model, trial.data, cwd or Path.cwd()
    if str(model.weights).startswith("hf_hub:"):
        model.weights = hub_folder(str(model.weights), fetch)
    if is_weights_file(model.weights):
        model.weights = os.path.join(cwd, user_path(str(model.weights)))
    for key in ("root", "labels", "images"):
        if given := getattr(data, key):
            setattr(data, key, os.path.join(cwd, user_path(given)))
    if not data.cache_dir.startswith("~"):  # each machine's own home
        data.cache_dir = os.path.join(cwd, data.cache_dir)
    validate(trial)
    for name, settings in trial.tracker.items():
        maker(name, settings)
    identify(trial, fetch)
    return trial


def hub_folder(given: str, fetch: bool) -> str:
    """The folder with weights (safetensors alone) and configuration of ``hf_hub:ORG/NAME[@REVISION]``.

    As Hugging Face's cache has it, so that later commands get the same; else, if ``fetch``, downloaded; or ConfigError.
    """
    name, _, revision = given.removeprefix("hf_hub:").partition("@")
    try:
        from huggingface_hub import snapshot_download

        wanted = ["*.safetensors", "*.json"]
        find: Any = functools.partial(snapshot_download, name, revision=revision or None, allow_patterns=wanted)
        with contextlib.suppress(OSError, ConfigError):  # nothing is there, or not all of it
            folder: str = find(local_files_only=True)
            if all(file.is_file() for file in weights_files(Path(folder))):
                return folder
        return find(local_files_only=not fetch)
    except ImportError:
        raise ConfigError(f"model.weights={given} needs huggingface_hub: pip install 'lora_vit[timm]'") from None
    except Exception as error:  # of the network, the hub or its library
        remedy = f"check name and network, or fetch *.safetensors and *.json of huggingface.co/{name} into a folder"
        raise ConfigError(f"model.weights={given} cannot be had ({one_line(error)}): {remedy} and give that") from None


def identify(trial: TrialConfig, fetch: bool = True) -> None:
    """Fill in what the trial's files contain; ``fetch``: also where that needs a download. Raises ConfigError."""
    weights, digest, known = trial.model.weights, None, DATASETS[trial.data.name]
    if weights is not None and is_weights_file(weights):
        digest = file_sha256(weights)
    elif weights is not None and fetch and trial.model.library == "torchvision" and not known.in_package:
        from lora_vit.models.weights import fetch_weights  # imports torch

        fetch_weights(trial.model)  # before data is fetched for it
    content = known_content(trial.data, fetch) or (None if fetch else trial.data.content)
    for key, given, found in (
        ("model.weights_sha256", trial.model.weights_sha256, digest),
        ("data.content", trial.data.content, content),
    ):
        if given is not None and given != found:
            raise ConfigError(f"{key}={given} is asked for, but what is there has {found}: give the same files")
    trial.model.weights_sha256, trial.data.content = digest, content


def is_identified(trial: TrialConfig) -> bool:
    """Whether it is known what the trial's images are, without which its id says nothing."""
    return trial.data.content is not None or DATASETS[trial.data.name].in_package
