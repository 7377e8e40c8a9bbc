"""Hydra's part: from overrides to typed, validated trials, and Hydra's errors as one line."""

from __future__ import annotations

import copy
import inspect
import itertools
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from lora_vit.config import WITHOUT_IDENTITY, RootConfig, SweepConfig, known_keys, nearest, to_dict, validate_sweep
from lora_vit.errors import ConfigError
from lora_vit.resolve import SECTIONS_BESIDE, from_omegaconf, register_resolvers
from lora_vit.sweep.engines import ENGINES
from lora_vit.sweep.plan import Request, default_name, label
from lora_vit.sweep.trial import Trial, key_of, without_idle, without_seed
from lora_vit.terminal import Every

HYDRA: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}
"""How Hydra is asked to behave; from 1.4 on it behaves so by itself."""
PATHS = ("data.root", "data.cache_dir", "model.weights", "hydra.run.dir", "hydra.sweep.dir", "sweep.name")
"""Keys whose values are names of files and folders."""
ELSEWHERE = {"sweep.subdir": "${trial_id:}", "job.chdir": False, "job.env_set": {}, "output_subdir": None}
"""Settings of Hydra for each job, with the only values that a packed sweep has."""


def register() -> None:
    """Put the schema, the engines, the resolvers and the sweeper into Hydra (call before it composes)."""
    from hydra.core.plugins import Plugins
    from hydra_plugins.lora_vit.packed_sweeper import PackedSweeper, PackedSweeperConf

    store = ConfigStore.instance().store
    replace: Any = {"replace": True} if "replace" in inspect.signature(store).parameters else {}  # of Hydra 1.4
    store(name="schema", node=RootConfig, **replace)
    store(group="hydra/sweeper", name="packed", node=PackedSweeperConf, provider="lora_vit", **replace)
    for name, node in ENGINES.items():
        store(group="engine", name=name, node=node, **replace)
    register_resolvers()
    Plugins.instance().register(PackedSweeper)  # Hydra 1.3 does not find it in an editable install


@contextmanager
def initialized() -> Iterator[None]:
    """Hydra with our configuration, for a script or a notebook; then its state is as it was before.

    Raises ConfigError instead of what Hydra raises.
    """
    running, config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        register()
        with hydra.initialize_config_module("lora_vit.conf", **HYDRA), in_one_line():
            yield
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = running, config


@contextmanager
def in_one_line() -> Iterator[None]:
    """Raise ConfigError, with one line, for an error of Hydra or OmegaConf."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def expand(overrides: Sequence[str], folder: Any = None) -> Request:
    """What ``python -m lora_vit.train -m OVERRIDES`` asks for, in a Hydra that is initialized. Raises ConfigError."""
    place = [] if folder is None else [f"hydra.sweep.dir={QuotedString(str(folder), Quote.single).with_quotes()}"]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    with in_one_line():
        given = [*overrides, *place]
        fixed = [str(o.input_line) for o in parser.parse_overrides(given) if not o.is_sweep_override()]
        master = hydra.compose("config", fixed, return_hydra_config=True)
        HydraConfig.instance().set_config(master)
        params = dict(master.hydra.sweeper.params)
        return sweep_request(master, params, [line for line in given if not line.startswith("hydra")])


class Composer:
    """Composes trials as Hydra does; overrides that only change a value cost milliseconds."""

    def __init__(self, config_name: str, fixed: Sequence[str]):
        """``fixed``: overrides that all trials have, those of Hydra's own node too."""
        self.config_name, self.fixed = config_name, list(fixed)
        self.fetch = True
        """Whether trials are composed with the content of their images, which may have to be downloaded."""
        self._loader = GlobalHydra.instance().config_loader()
        self._parser = OverridesParser.create(config_loader=self._loader)
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        self._is_value: dict[str, bool] = {}

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Overrides as Hydra reads them."""
        return self._parser.parse_overrides(list(overrides))

    def exactly(self, overrides: Sequence[str]) -> DictConfig:
        """The trial's config by Hydra's own way, with Hydra's node."""
        return hydra.compose(self.config_name, [*self.fixed, *overrides], return_hydra_config=True)

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """The trial's config. Raises what Hydra raises."""
        parsed = self.parse(overrides)
        others = tuple(line for line, o in zip(overrides, parsed, strict=True) if not self.changes_a_value(o))
        base = self._bases.get(others)
        if base is None:
            base = self._bases[others] = self.exactly(others)
        HydraConfig.instance().set_config(base)  # for ${hydra:...}
        config = copy.deepcopy(base)
        try:
            for override in parsed:
                if self.changes_a_value(override):
                    OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return self.exactly(overrides)  # for Hydra's message
        return config

    def changes_a_value(self, override: Override) -> bool:
        """Whether an override only replaces a value of the composed config."""
        key = override.key_or_group
        if key not in self._is_value:
            self._is_value[key] = not key.startswith("hydra") and not self._loader.get_group_options(key)
        plain = not (override.is_add() or override.is_delete() or override.is_force_add() or override.package)
        return plain and self._is_value[key]


def sweep_request(master: Any, params: dict[str, Any], arguments: Sequence[str]) -> Request:
    """What a sweep's command asks for, every trial of it composed and validated.

    Args:
        master: the composed config of what is not swept, with Hydra's node.
        params: ``hydra.sweeper.params``; the command line replaces their keys.
        arguments: the overrides of the command line.

    Raises:
        ConfigError: in one line; with every trial that cannot run, a line each.
    """
    register_resolvers()
    given: Any = OmegaConf.to_container(master.hydra.overrides.hydra, resolve=False)
    composer = Composer(master.hydra.job.config_name, [line for line in given if key_of(line) != "hydra.mode"])
    with in_one_line():
        parsed = composer.parse([*(f"{key}={value}" for key, value in params.items()), *arguments])
        overrides = {o.get_key_element(): o for o in parsed}
        options = sweep_options(master)
        composer.fetch = not options.dry_run
        swept = {key: o for key, o in overrides.items() if o.is_sweep_override()}
        fixed = [_line(o) for o in overrides.values() if not o.is_sweep_override()]
        refuse_without_effect(master, options, list(swept), [*map(str, given), *fixed])
        refuse_misread_paths([*map(str, given), *(str(o.input_line) for o in parsed)])
        folder = _folder(master, list(swept), {key: o for key, o in overrides.items() if key not in swept})
        request = Request(folder, options, engine=OmegaConf.to_object(master.engine),
                          hydra=OmegaConf.to_yaml(OmegaConf.masked_copy(master, ["hydra"])))  # fmt: skip
        if options.trials is not None:
            request.search = search_space(composer, master, swept, fixed, options.trials)
            return request
        if intervals := [key for key, o in swept.items() if not o.is_discrete_sweep()]:
            raise ConfigError(f"{intervals[0]} is a range without steps: give sweep.trials=30 for a search over it")
        axes = [[f"{key}={value}" for value in o.sweep_string_iterator()] for key, o in swept.items()]
        request.trials = compose_all(composer, fixed, [list(lines) for lines in itertools.product(*axes)])
        if not request.trials:
            raise ConfigError("the sweep is empty: a swept key has no value, give it some as lora.rank=2,4")
        if options.margin is not None:
            refuse_seed_dependent(composer, fixed, request.trials)
    return request


def _line(override: Override) -> str:
    """An override that is not swept, as it was given."""
    return str(override.input_line)


def sweep_options(cfg: Any) -> SweepConfig:
    """The validated sweep settings of a composed config. Raises ConfigError."""
    values: Any = OmegaConf.to_container(cfg.sweep, resolve=True)
    options = SweepConfig(**values)
    validate_sweep(options)
    return options


def _folder(master: Any, swept: Sequence[str], fixed: dict[str, Override]) -> Path:
    """The sweep's folder: under its name, or one made from what is swept and what is fixed."""
    if master.sweep.name is not None:
        return Path(str(master.hydra.sweep.dir))
    rest: Any = OmegaConf.to_container(master, resolve=False)
    rest = {key: value for key, value in rest.items() if key not in ("hydra", "sweep", "engine", *swept)}
    for key in (*WITHOUT_IDENTITY, *swept):
        section, _, name = key.partition(".")
        if name and isinstance(rest.get(section), dict):
            rest[section].pop(name, None)
    ours = {key: str(o.get_value_element_as_str()) for key, o in fixed.items()
            if not key.startswith(("hydra", "sweep.", "engine")) and key not in WITHOUT_IDENTITY}  # fmt: skip
    named = copy.deepcopy(master)
    with read_write(named), open_dict(named):
        named.sweep.name = default_name(swept, ours.get("sweep"), [rest, ours])
    return Path(str(named.hydra.sweep.dir))


def compose_all(composer: Composer, fixed: Sequence[str], swept: Sequence[Sequence[str]]) -> list[Trial]:
    """Every trial of the sweep, validated; ``swept``: the overrides of each.

    Raises:
        ConfigError: with every trial that cannot run, one line each.
    """
    trials: list[Trial] = []
    refused: dict[str, list[str]] = {}
    began, plain = time.monotonic(), Every(5.0)
    for i, lines in enumerate(swept):
        try:
            trials.append(compose_trial(composer, fixed, lines))
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            refused.setdefault(explain(error), []).append(label(lines))
        if plain.due():
            print(f"composing: {i + 1}/{len(swept)} trials", file=sys.stderr)
    if time.monotonic() - began > 5:
        print(f"composed {len(swept)} trials in {time.monotonic() - began:.1f} s", file=sys.stderr)
    if refused:
        keys = {key_of(line) for lines in swept for line in lines}
        comma = [f"  ({key}: a comma separates values; a name with a comma is given in quotes, \"{key}='a,b'\")"
                 for key in PATHS if key in keys]  # fmt: skip
        raise ConfigError("\n".join([_refusal(refused, len(swept)), *comma]))
    return trials


def compose_trial(composer: Composer, fixed: Sequence[str], swept: Sequence[str]) -> Trial:
    """One trial of a sweep. Raises ConfigError, or what Hydra raises."""
    node = composer([*fixed, *swept])
    config = from_omegaconf(node, in_sweep=True, fetch=composer.fetch, cwd=Path(str(node.hydra.runtime.cwd)))
    return Trial(config, [*fixed, *swept], label(without_idle(config, swept)))


def _refusal(refused: dict[str, list[str]], total: int) -> str:
    """Each message once, with the trials it is about."""
    lines = [f"{sum(map(len, refused.values()))} of {total} trials cannot run, so none is started:"]
    for message, labels in refused.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        lines.append(f"  {message}   [{labels[0] or 'as given'}{more}]")
    return "\n".join(lines)


def refuse_seed_dependent(composer: Composer, fixed: Sequence[str], trials: Sequence[Trial]) -> None:
    """Raise ConfigError if a setting follows the seed: a race gives each cell other seeds."""
    seed = f"seed={trials[0].config.seed + 1}"
    for trial in trials:
        other = compose_trial(composer, without_seed(fixed), [*without_seed(trial.overrides[len(fixed) :]), seed])
        ours, theirs = to_dict(trial.config), to_dict(other.config)
        if wrong := [key for key in ours if key != "seed" and ours[key] != theirs[key]]:
            raise ConfigError(f"{wrong[0]} depends on the seed: a race compares cells over its seeds, so give every "
                              "setting but seed a value of its own")  # fmt: skip


def search_space(
    composer: Composer, master: Any, swept: dict[str, Override], fixed: Sequence[str], trials: int
) -> dict[str, Any]:
    """What a search may choose from, as its plan keeps it; the ends of all ranges are composed and validated.

    Raises ConfigError.
    """
    if wrong := [key for key in swept if key == "seed"]:  # the best seed is luck
        raise ConfigError(f"{wrong[0]} cannot be searched: give it one value")
    if not swept:
        raise ConfigError("nothing is searched: give a range, as 'optimizer.lr=tag(log,interval(1e-4,1e-2))'")
    from lora_vit.sweep.source import distribution, import_optuna  # imports numpy

    import_optuna(trials)  # a line before anything is written
    space = {key: _choices(composer, o, fixed) for key, o in swept.items()}
    for key, of in space.items():
        distribution(key, of)
    groups = [[[key, text] for text, _ in of["choices"]] for key, of in space.items() if of["group"]]
    bases = []
    for options in itertools.product(*groups):
        config = composer([*fixed, *(f"{key}={text}" for key, text in options)])
        plain: Any = OmegaConf.to_container(config, resolve=False)
        for section, name in (("data", "root"), ("data", "cache_dir"), ("model", "weights")):
            value = plain[section][name]  # a worker may be started in another folder
            if isinstance(value, str) and "/" in value and not value.startswith(("/", "~", "$")):
                plain[section][name] = str(Path(str(master.hydra.runtime.cwd), value))
        ours = {key: part for key, part in plain.items() if key not in SECTIONS_BESIDE}  # how it runs may change later
        bases.append([list(map(list, options)), OmegaConf.to_yaml(ours)])
    ends = [[f"{key}={of[end] if 'choices' not in of else of['choices'][i][0]}" for key, of in space.items()]
            for i, end in ((0, "low"), (-1, "high"))]  # fmt: skip
    compose_all(composer, fixed, ends)
    fixed = [line for line in fixed if not line.startswith(("sweep.", "engine"))]
    return {"trials": trials, "space": space, "bases": bases, "fixed": fixed}


def _choices(composer: Composer, override: Override, fixed: Sequence[str]) -> dict[str, Any]:
    """The values of a key: ``choices`` (text and value), or ``low`` and ``high`` of a range."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        integer = isinstance(OmegaConf.select(composer(fixed), override.key_or_group), int)  # Hydra reads 1 as 1.0
        if integer:
            low, high = int(low or 0), int(high or 0)
        return {"low": low, "high": high, "log": "log" in value.tags, "integer": integer, "group": False,
                "step": 1 if integer else None}  # fmt: skip
    lines = [(text, f"{override.get_key_element()}={text}") for text in override.sweep_string_iterator()]
    choices = [[text, composer.parse([line])[0].value()] for text, line in lines]
    return {"choices": choices, "group": not composer.changes_a_value(override)}


def refuse_without_effect(master: Any, options: SweepConfig, swept: Sequence[str], given: Sequence[str]) -> None:
    """Raise ConfigError if a setting of Hydra's or of the sweep's would do nothing, or cannot be."""
    race, search = options.margin is not None, options.trials is not None

    def first(*prefixes: str) -> str:
        return next((line for line in given if line.lstrip("+~").startswith(prefixes)), "")

    own = next((key for key in swept if key.startswith(("sweep", "hydra", "engine"))), "")
    values: Any = OmegaConf.to_container(master.hydra, resolve=False)
    odd = {key: values[key.partition(".")[0]] for key in ELSEWHERE}
    odd = {key: value[key.partition(".")[2]] if "." in key else value for key, value in odd.items()}
    odd = {key: value for key, value in odd.items() if value != ELSEWHERE[key]}
    for wrong, why in (
        (own, "is the sweep's own and cannot be swept: give it one value"),
        (first("hydra.run."), "has no effect on a sweep: give sweep.name or hydra.sweep.dir"),
        (first("hydra/launcher", "hydra.launcher"),
         "has no effect beside this sweeper: choose engine=local, slurm or ray, or hydra/sweeper=basic"),
        (not race and first("sweep.first_seeds", "sweep.most_seeds"),
         "has no effect without sweep.margin, which makes the sweep a race"),
        (race and "seed" in swept and "seed",
         "cannot be swept in a race (sweep.margin), which chooses its seeds: give its first one, seed=0"),
        (race and search and f"sweep.trials={options.trials}", "makes a search, sweep.margin a race: give one of them"),
        (not options.wait and master.engine.name != "slurm" and "sweep.wait=false",
         "needs engine=slurm: only workers on Slurm outlive the command"),
        (odd and f"hydra.{next(iter(odd))}={next(iter(odd.values()))}",
         "has no effect on packed trials: leave it out, or choose hydra/sweeper=basic"),
        (options.dry_run and search and "sweep.dry_run=true", "cannot say what a search will suggest: leave it out"),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(f"{wrong} {why}")


def refuse_misread_paths(lines: Sequence[str]) -> None:
    """Raise ConfigError if Hydra reads something else than the text that was given as the name of a file or folder."""
    for override in OverridesParser.create().parse_overrides([line for line in lines if key_of(line) in PATHS]):
        if not override.is_sweep_override():
            value, text = override.value(), override.get_value_string()
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{override.input_line} is read as {value!r}: {quoted(override.key_or_group, text)}")


def quoted(key: str, text: str) -> str:
    """How to give a name that Hydra's grammar reads otherwise."""
    return f"give the name in quotes, \"{key}={QuotedString(text, Quote.single).with_quotes()}\""


_HYDRAS = (
    (r"Could not override '(hydra.sweeper.params[^']*)'",
     "{0} has to be added: +{0}=..., or give what is swept itself, as lora.rank=1,2"),
    (r"Could not override '(hydra[^']*)'", "unknown key '{0}' (see --cfg hydra)"),
    (r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'",
     "{0} names several values: add -m for a sweep over them, or write a list as key=[a,b]"),
    (r"Config group override must be a string",
     "a group has no option 'null': leave it out, or choose one (see --help)"),
)  # fmt: skip
"""What Hydra's messages say, and what ours say."""


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
            key, _, text = str(link.override).partition("=")
            remedy = f": {quoted(key, text)}" if key.lstrip("+") in PATHS else ""
            return f"cannot read the override '{link.override}' ({link.message.splitlines()[0]}){remedy}"
    text = "\n".join(str(link) for link in chain)
    for pattern, ours in _HYDRAS:
        if found := re.search(pattern, text):
            return ours.format(*found.groups())
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"unknown key '{found[1]}'{nearest(found[1], known_keys()) or ' (see --help)'}"
    if found := re.search(r"Could not (?:find|load) '([^']+)'[\s\S]*?Available options in '[^']+':((?:\n\t.+)*)", text):
        options = [o.strip() for o in found[2].split("\n") if o.strip()]
        near = nearest(found[1].rpartition("/")[2], options)
        return f"'{found[1]}' does not exist{near} (one of: {', '.join(options)})"
    if found := re.search(r"full_key: (\S+)", text):
        return f"{found[1]}: {next(str(link) for link in chain if found[0] in str(link)).splitlines()[0]}"
    lines = [line for line in text.splitlines() if line and not line.startswith("In '")]
    return lines[0] if lines else type(error).__name__
