"""Hydra's part: from overrides to typed, validated trials, and Hydra's errors as one line."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_vit.config import (
    RootConfig,
    SweepConfig,
    TrialConfig,
    file_sha256,
    from_dict,
    is_weights_file,
    known_keys,
    nearest,
    trial_id,
    validate,
    validate_sweep,
)
from lora_vit.data.dataset import IN_PACKAGES, known_content
from lora_vit.errors import ConfigError
from lora_vit.sweep.plan import Job, key_of, label
from lora_vit.terminal import Every


@dataclass
class PackedLauncherConf:
    """``hydra/launcher=packed``; its settings are in ``sweep``."""

    _target_: str = "hydra_plugins.lora_vit.packed_launcher.PackedLauncher"


@dataclass
class PackedSlurmConf:
    """``hydra/launcher=packed_slurm``: each worker is a job. The names are submitit's, and mean what they mean there.

    Attributes:
        timeout_min: minutes of a job; a worker that has not ended by then saves, and is queued again.
        gpus_per_node: of a job; a worker trains on one.
        signal_delay_s: seconds before the limit at which it is asked to save.
        max_num_timeout: how often it is queued again.
    """

    _target_: str = "hydra_plugins.lora_vit.packed_launcher.PackedSlurmLauncher"
    name: str = "lora_vit"
    timeout_min: int = 60
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem_gb: int | None = None
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    comment: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None
    cpus_per_gpu: int | None = None
    mem_per_gpu: str | None = None
    mem_per_cpu: str | None = None
    signal_delay_s: int = 120
    max_num_timeout: int = 100
    array_parallelism: int = 256
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    setup: list[str] | None = None


@dataclass
class PackedRayConf:
    """``hydra/launcher=packed_ray``: each worker is a task.

    Attributes:
        address: of a running cluster, or ``auto``; None: a cluster of its own on this machine.
        num_cpus: of a task.
        num_gpus: of a task; None: 1 where the cluster has GPUs.
        resources: further ones of a task, by name.
        runtime_env: as Ray's.
    """

    _target_: str = "hydra_plugins.lora_vit.packed_launcher.PackedRayLauncher"
    address: str | None = None
    num_cpus: float = 1
    num_gpus: float | None = None
    resources: dict[str, float] = field(default_factory=dict)
    runtime_env: dict[str, Any] = field(default_factory=dict)


@dataclass
class GridSweeperConf:
    """``hydra/sweeper=grid``: every combination, as with ``basic``. ``params``: the same as overrides."""

    _target_: str = "hydra_plugins.lora_vit.packed_launcher.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] = field(default_factory=dict)


def _hydras_config() -> HydraConf:
    """Hydra's own, with our launcher and sweeper; named in conf/config.yaml they would win over an experiment's."""
    config = HydraConf()
    ours = {"launcher": "packed", "sweeper": "grid"}
    config.defaults = [{key: ours.get(key, value) for key, value in entry.items()} for entry in config.defaults]
    return config


def register_schema() -> None:
    """Put the schema and the resolvers where Hydra finds them (call before ``hydra.main`` runs)."""
    store = ConfigStore.instance().store
    store(name="schema", node=RootConfig)
    store(group="hydra", name="config", node=_hydras_config(), provider="lora_vit")
    OmegaConf.register_new_resolver("trial_id", _known_trial_id, replace=True)
    OmegaConf.register_new_resolver("rank_times", _rank_times, replace=True)
    OmegaConf.register_new_resolver("at_least", lambda *values: max(map(int, values)), replace=True)
    plugins = str(Path(__file__).parent / "plugins")
    if plugins not in sys.path:  # Hydra finds the packed launcher there
        sys.path.append(plugins)


UNKNOWN_ID = "TRIAL"
"""Stands for a trial id in a path, while files would have to be read to know it, or the config is not valid."""


def _known_trial_id(_root_: Any) -> str:
    try:
        trial = from_omegaconf(_root_, True, fetch=False)
    except (ConfigError, OmegaConfBaseException):  # whoever uses the path says what is wrong
        return UNKNOWN_ID
    return UNKNOWN_ID if trial.data.content is None and trial.data.name not in IN_PACKAGES else trial_id(trial)


def _rank_times(scaling: float, _parent_: Any) -> float | str | None:
    """``lora.alpha=${rank_times:2}``: alpha tied to the rank, so that alpha / rank is the same for all ranks."""
    if "rank" not in _parent_:  # in a preset's hydra.sweeper.params, which Hydra resolves before there are trials
        return f"${{rank_times:{scaling}}}"
    return None if _parent_.rank is None else scaling * _parent_.rank


def from_omegaconf(cfg: Any, in_sweep: bool = False, fetch: bool = True) -> TrialConfig:
    """The plain, validated dataclass of a composed Hydra config (keys that are not the trial's are left out).

    ``in_sweep``: settings without effect, such as ``lora.rank`` under ``lora=none``, are dropped rather than refused.
    ``fetch``: download and read what decides the trial's identity, unless this is a dry run.
    """
    wanted = [f.name for f in dataclasses.fields(TrialConfig)]
    plain = {}
    for key in cfg:
        if key not in (*wanted, "hydra", "sweep"):
            raise ConfigError(f"unknown key '{key}'{nearest(str(key), known_keys()) or ' (see --help)'}")
    for key in wanted:
        try:
            node = cfg[key]
            plain[key] = (
                OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
            )
        except MissingMandatoryValue as error:
            missing = error.full_key or key
            raise ConfigError(f"{missing} has no value: give one, for example {missing}=...") from None
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).splitlines()[0]) from None
    if in_sweep:
        drop_idle(plain)
    trial = from_dict(plain)
    _find_from_anywhere(trial)
    validate(trial)
    identify(trial, fetch=fetch and not cfg["sweep"]["dry_run"])
    return trial


def identify(trial: TrialConfig, fetch: bool = True) -> None:
    """Fill in what its files contain, or compare it with what is given; without ``fetch`` only what is known already.

    Raises:
        ConfigError: a file cannot be read, or its content is not the given one.
    """
    weights, digest = trial.model.weights, None
    if weights is not None and is_weights_file(weights):
        digest = file_sha256(Path(os.path.expanduser(weights)))
    elif weights is not None and trial.model.library == "torchvision" and trial.data.name not in IN_PACKAGES:
        from lora_vit.models.weights import check_weights  # imports torch

        check_weights(trial.model.name, weights)  # before data is fetched for it
    content = known_content(trial.data, fetch)
    for key, given, found in (
        ("model.weights_sha256", trial.model.weights_sha256, digest),
        ("data.content", trial.data.content, content),
    ):
        if given is not None and given != found:
            raise ConfigError(f"{key}={given} is asked for, but what is there has {found}: give the same files")
    trial.model.weights_sha256, trial.data.content = digest, content


def _find_from_anywhere(trial: TrialConfig) -> None:
    """Make the paths that other commands need later absolute; ``model.weights=none`` means null, as elsewhere."""
    if str(trial.model.weights).lower() in ("none", "null"):
        trial.model.weights = None
    if is_weights_file(trial.model.weights):
        trial.model.weights = to_absolute_path(os.path.expanduser(str(trial.model.weights)))
    if trial.data.root:
        trial.data.root = to_absolute_path(os.path.expanduser(trial.data.root))
    if not trial.data.cache_dir.startswith("~"):  # each machine's own home
        trial.data.cache_dir = to_absolute_path(trial.data.cache_dir)


def drop_idle(values: dict[str, Any]) -> list[str]:
    """Set to None what has no effect in a nested config (adapter settings of a baseline); returns their keys."""
    lora = values.get("lora")
    if not isinstance(lora, dict) or lora.get("method") not in ("none", "full"):
        return []
    idle = [key for key, value in lora.items() if key != "method" and value is not None]
    lora.update(dict.fromkeys(idle))
    return [f"lora.{key}" for key in idle]


def sweep_from_omegaconf(node: Any) -> SweepConfig:
    """The plain, validated sweep settings of a composed config. Raises ConfigError."""
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    sweep = SweepConfig(**{str(k): v for k, v in values.items()})
    validate_sweep(sweep)
    return sweep


PATHS = ("data.root", "data.cache_dir", "model.weights", "hydra.run.dir", "hydra.sweep.dir", "sweep.name")
"""Keys whose values are names of files and folders."""
_PATH_OVERRIDE = re.compile(rf"(\+{{0,2}}({'|'.join(map(re.escape, PATHS))}))=(.*)", re.DOTALL)
_PIECE = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)""")


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """The command line with names of files and folders in quotes where Hydra would read something else from them.

    ``data.root=2024_11`` is a number to Hydra, ``hydra.run.dir=a(b)`` a function. What is in Hydra's quotes already
    stays, and so do ``null`` and ``${...}``; a comma separates values in a sweep, where the key can be swept.
    """
    sweep = any(a in ("-m", "--multirun") or a.lower() == "hydra.mode=multirun" or a[:6] == "sweep=" for a in arguments)
    parser = OverridesParser.create()
    quoted = []
    for argument in arguments:
        if match := _PATH_OVERRIDE.fullmatch(argument):
            given, key, value = match.groups()
            separates = sweep and key.startswith(("data.", "model."))
            pieces = [m[1] for m in _PIECE.finditer(value) if m[1]] if separates else [value]
            argument = f"{given}={','.join(_quoted(parser, key, piece) for piece in pieces)}"
        quoted.append(argument)
    return quoted


def _quoted(parser: OverridesParser, key: str, value: str) -> str:
    """A name as Hydra has to be given it. ``~`` is the home folder in all of them, as Hydra would not know."""
    if key.startswith("hydra."):
        value = os.path.expanduser(value)
    try:
        parsed = parser.parse_override(f"{key}={value}")
        as_meant = parsed.value() if parsed.value_type == ValueType.ELEMENT else ""
        if value in ("", "null") or as_meant == value or (parsed.is_sweep_override() and not parsed.is_choice_sweep()):
            return value
        if isinstance(as_meant, str) and value[:1] in ("'", '"'):
            return value
    except HydraException:
        pass
    literal = re.sub(r"(\\*)\$\{(?![^{}]+\})", r"\1\1\\${", value)  # one that is not closed is no interpolation
    return QuotedString(literal, Quote.single).with_quotes()


class Composer:
    """Composes trials as Hydra does; overrides that only change a value cost milliseconds instead of 0.3 s."""

    def __init__(self, loader: ConfigLoader, master: DictConfig):
        self.loader, self.master = loader, master
        self._parser = OverridesParser.create(config_loader=loader)
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        self._is_value: dict[str, bool] = {}

    def exactly(self, overrides: Sequence[str]) -> DictConfig:
        """The trial's config by Hydra's own way."""
        config = self.loader.load_sweep_config(self.master, list(overrides))
        for part in ("launcher", "sweeper", "sweep"):
            ours, all_have = (OmegaConf.to_container(c.hydra[part], resolve=False) for c in (config, self.master))
            if ours != all_have:
                raise ConfigError(f"hydra.{part} cannot differ between trials: name it for all, as hydra/{part}=...")
        trial = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
        OmegaConf.set_struct(trial, True)
        return trial

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """The trial's config (without the ``hydra`` node). Raises what Hydra raises."""
        parsed = self._parser.parse_overrides(list(overrides))
        plain = [o for o in parsed if self._changes_a_value(o)]
        others = tuple(line for line, o in zip(overrides, parsed, strict=True) if not self._changes_a_value(o))
        base = self._bases.get(others)
        if base is None:
            base = self._bases[others] = self.exactly(others)
        config = copy.deepcopy(base)
        try:
            for override in plain:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return self.exactly(overrides)  # for Hydra's message
        return config

    def _changes_a_value(self, override: Override) -> bool:
        key = override.key_or_group
        if key not in self._is_value:
            self._is_value[key] = not key.startswith("hydra") and not self.loader.get_group_options(key)
        plain = not (override.is_add() or override.is_delete() or override.is_force_add() or override.package)
        return plain and self._is_value[key]


def compose_all(loader: ConfigLoader, master: DictConfig, all_overrides: Sequence[Sequence[str]]) -> list[Job]:
    """Every trial of the sweep, validated.

    Raises:
        ConfigError: with every trial that cannot run, one line each.
    """
    composer = Composer(loader, master)
    constant = not_swept(master.hydra, all_overrides)
    jobs: list[Job] = []
    refused: dict[str, list[str]] = {}
    began, plain = time.monotonic(), Every(5.0)
    for i, overrides in enumerate(all_overrides):
        named = label(overrides, constant)
        try:
            config = composer(overrides)
            job = Job(from_omegaconf(config, in_sweep=True), list(overrides))
            job.label = label(overrides, constant.union(job.idle()))
            jobs.append(job)
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            refused.setdefault(explain(error), []).append(named)
        if plain.due():
            print(f"composing: {i + 1}/{len(all_overrides)} trials", file=sys.stderr)
    if time.monotonic() - began > 5:
        print(f"composed {len(all_overrides)} trials in {time.monotonic() - began:.1f} s", file=sys.stderr)
    if refused:
        swept = {key_of(line) for overrides in all_overrides for line in overrides if line not in constant}
        comma = [f"  ({key}: a comma separates values; a name with a comma needs Hydra's quotes, \"{key}='a,b'\")"
                 for key in PATHS if key in swept]  # fmt: skip
        raise ConfigError("\n".join([_refusal(refused, len(all_overrides)), *comma]))
    return jobs


def not_swept(hydra: Any, all_overrides: Sequence[Sequence[str]]) -> set[str]:
    """The overrides of keys that are not swept, which a label leaves out."""
    swept = OmegaConf.select(hydra, "callbacks.name_sweep.swept")
    if swept is None:  # a sweeper of its own kind
        return set.intersection(*map(set, all_overrides)) if len(all_overrides) > 1 else set()
    return {line for overrides in all_overrides for line in overrides if line.partition("=")[0] not in swept}


def _refusal(refused: dict[str, list[str]], total: int) -> str:
    """Each message once, with the trials it is about."""
    count = sum(map(len, refused.values()))
    lines = [f"{count} of {total} trials cannot run, so none is started:"]
    for message, labels in refused.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        lines.append(f"  {message}   [{labels[0] or 'as given'}{more}]")
    return "\n".join(lines)


def _hydras_nodes() -> dict[str, Any]:
    """Hydra's dotted keys, those of our launchers among them, each with its default."""

    def below(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        yield prefix, value
        for key, inner in value.items() if isinstance(value, dict) else ():
            yield from below(f"{prefix}.{key}", inner)

    confs = (("hydra", HydraConf), ("hydra.launcher", PackedSlurmConf), ("hydra.launcher", PackedRayConf))
    return dict(
        node for prefix, conf in confs for node in below(prefix, OmegaConf.to_container(OmegaConf.structured(conf)))
    )


def explain(error: BaseException) -> str:
    """One line of a Hydra or OmegaConf error: the key, the value and the remedy."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for link in chain:
        if isinstance(link, ConfigError):
            return str(link)
        if isinstance(link, OverrideParseException):
            return f"cannot read the override '{link.override}': {link.message.splitlines()[0]}"
    texts = [str(e) for e in chain]
    for text in texts:
        if found := re.search(r"Could not override '([^']+)'", text):
            key = found[1]
            if key.startswith("hydra.sweeper.params"):
                return f"{key} has to be added: +{key}=..., or give what is swept itself, as lora.rank=1,2"
            if key.startswith("hydra"):
                nodes = _hydras_nodes()
                if empty := [free for free in (key, key.rpartition(".")[0]) if nodes.get(free) == {}]:
                    return f"{empty[0]} has no keys yet, and one is added with a plus: +{empty[0]}.KEY=VALUE"
                known = ["hydra/launcher", "hydra/sweeper", *nodes]
                return f"unknown key '{key}'{nearest(key, known) or ' (see --cfg hydra)'}"
            return f"unknown key '{key}'{nearest(key, known_keys()) or ' (see --help)'}"
        if found := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", text):
            return f"{found[1]} names several values: add -m for a sweep over them, or write a list as key=[a,b]"
        if found := re.search(
            r"Could not (?:find|load) '([^']+)'[\s\S]*?Available options in '[^']+':((?:\n\t.+)*)", text
        ):
            options = [o.strip() for o in found[2].split("\n") if o.strip()]
            choice = found[1].rpartition("/")[2]
            if found[1].startswith("hydra/sweeper/optuna"):
                return f"{found[1]} is not installed: pip install lora_vit[search]"
            return f"'{found[1]}' does not exist{nearest(choice, options)} (one of: {', '.join(options)})"
    for text in texts:
        if found := re.search(r"full_key: (\S+)", text):
            return f"{found[1]}: {text.splitlines()[0]}"
    return texts[0].splitlines()[0]
