"""Hydra's part: from overrides to typed, validated trials, and Hydra's errors as one line."""

import copy
import functools
import itertools
import math
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from hydra_plugins.lora_vit.packed_sweeper import PackedSweeper, PackedSweeperConf
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_vit.config import WITHOUT_IDENTITY, RootConfig, SweepConfig, nearest, unknown_key, validate_sweep
from lora_vit.config.schema import ADDED, SAYS, idle, wrong_type
from lora_vit.distributed import started_by_torchrun
from lora_vit.errors import ConfigError, line_of, one_line
from lora_vit.resolve import SECTIONS_BESIDE, from_omegaconf, register_resolvers
from lora_vit.sweep.engines import ENGINES
from lora_vit.sweep.plan import Request, label, short_key
from lora_vit.sweep.trial import Trial, digest, key_of, without_idle
from lora_vit.terminal import Progress

HYDRA: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}  # 1.4 does so anyway
PATHS = ("data.root", "data.labels", "data.images", "data.cache_dir", "model.weights",
         "hydra.run.dir", "hydra.sweep.dir", "sweep.name")  # fmt: skip
"""Keys whose values are names of files and folders."""


def register() -> None:
    """Put the schema, the engines, the resolvers and the sweeper into Hydra, before it composes."""
    store = ConfigStore.instance().store
    replace: Any = {} if HYDRA else {"replace": True}  # 1.3 replaces by itself
    store(name="schema", node=RootConfig, **replace)
    store(group="hydra/sweeper", name="packed", node=PackedSweeperConf, provider="lora_vit", **replace)
    for name, node in ENGINES.items():
        store(group="engine", name=name, node=node, **replace)
    register_resolvers()
    Plugins.instance().register(PackedSweeper)  # Hydra 1.3 does not find it in an editable install


@contextmanager
def initialized() -> Iterator[None]:
    """Hydra with our configuration, for a script or a notebook; then its state is as before. Raises ConfigError."""
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
    """Raise ConfigError, with one line, for an error of Hydra, OmegaConf or YAML that a user can cause."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(explain(error)) from error
    except (ValueError, OSError) as error:  # Hydra also makes a folder
        line = line_of(error).removeprefix("error: ")
        if "Config group override must be" in str(error):
            key = getattr(seen_in(error, "override"), "key_or_group", "GROUP")
            line = f"{key}=null: a group has no option 'null': leave it out, or choose one (see --help), or tracker=[]"
        if "Only one of --run" in str(error):
            line = "--cfg and --info show one trial: leave -m out"
        if line:
            raise ConfigError(line) from error
        raise


def expand(overrides: Sequence[str], folder: Any = None) -> Request:
    """What ``python -m lora_vit.train -m OVERRIDES`` asks for, in a Hydra that is initialized. Raises ConfigError."""
    place = [] if folder is None else [f"hydra.sweep.dir={QuotedString(str(folder), Quote.single).with_quotes()}"]
    ours: Any = GlobalHydra.instance().hydra
    master = ours.compose_config("config", [*overrides, *place], RunMode.MULTIRUN, from_shell=False)
    HydraConfig.instance().set_config(master)
    return sweep_request(master)


def own_groups(folder: Any) -> list[str]:
    """The override that finds groups in a folder, as ``--config-dir`` does; none without."""
    if folder is None:
        return []
    return [f"hydra.searchpath=[{QuotedString(f'file://{Path(folder).absolute()}', Quote.single).with_quotes()}]"]


class Composer:
    """Composes trials as Hydra does, with what is ``fixed``; overrides that only change a value cost milliseconds."""

    def __init__(self, config_name: str = "config", fixed: Sequence[str] = ()):
        self.config_name, self.fixed = config_name, fixed
        self.fetch = True  # the content of images, which may have to be downloaded
        loader = GlobalHydra.instance().config_loader()
        parser = OverridesParser.create(config_loader=loader)
        self.parse = functools.cache(lambda line: parser.parse_overrides([line])[0])
        self._options = functools.cache(loader.get_group_options)
        self._base = functools.cache(self._composed)

    def exactly(self, overrides: Sequence[str]) -> DictConfig:
        """The trial's config by Hydra's own way, with Hydra's node."""
        return hydra.compose(self.config_name, [*self.fixed, *overrides], return_hydra_config=True)

    def _composed(self, overrides: Sequence[str]) -> tuple[DictConfig, Any]:
        """The config without Hydra's node, and that as ``${hydra:...}`` finds it."""
        config = self.exactly(overrides)
        HydraConfig.instance().set_config(config)
        trial = copy.deepcopy(config)
        with open_dict(trial):
            del trial["hydra"]
        return trial, HydraConfig.instance().cfg

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        """The trial's config without Hydra's node."""
        values = [o for o in map(self.parse, overrides) if self.changes_a_value(o)]
        lines = {o.input_line for o in values}
        base, HydraConfig.instance().cfg = self._base(tuple(line for line in overrides if line not in lines))
        config = copy.deepcopy(base)
        try:
            for override in values:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return self.exactly(overrides)  # for Hydra's message
        return config

    def changes_a_value(self, override: Override) -> bool:
        """Whether an override only replaces a value of the composed config."""
        key, is_plain = override.key_or_group, override.type == OverrideType.CHANGE
        return is_plain and not override.package and not key.startswith("hydra") and not self._options(key)


def sweep_request(master: Any) -> Request:
    """What a sweep's command asks for, all trials validated; ``master``: what is not swept. Raises ConfigError."""
    if started_by_torchrun():
        raise ConfigError("a sweep starts its own processes: start it without torchrun")
    given: Any = OmegaConf.to_container(master.hydra.overrides, resolve=False)
    composer = Composer(master.hydra.job.config_name, [line for line in given["hydra"] if key_of(line) != "hydra.mode"])
    params = [f"{key}={value}" for key, value in master.hydra.sweeper.params.items()]
    parsed = [composer.parse(line) for line in (*params, *given["task"])]  # the command line replaces a preset's keys
    overrides = {o.get_key_element(): o for o in parsed}
    swept = {key: o for key, o in overrides.items() if o.is_sweep_override()}
    fixed = [str(o.input_line) for o in overrides.values() if not o.is_sweep_override()]
    options: Any = OmegaConf.to_object(master.sweep)
    validate_sweep(options)
    composer.fetch = not options.dry_run
    refuse_without_effect(master, options, list(swept), [*given["hydra"], *fixed])
    refuse_misread_paths([*given["hydra"], *(str(o.input_line) for o in parsed)])
    if options.name is None:
        master.sweep.name = _name(master, swept, overrides)
    request = Request(Path(str(master.hydra.sweep.dir)), options, engine=OmegaConf.to_object(master.engine),
                      hydra=OmegaConf.to_yaml(OmegaConf.masked_copy(master, ["hydra"])))  # fmt: skip
    if options.trials is not None:
        request.search, request.trials = search_space(composer, swept, fixed, options.trials)
        return request
    if intervals := [key for key, o in swept.items() if not o.is_discrete_sweep()]:
        raise ConfigError(f"{intervals[0]} is a range without steps: give sweep.trials=30 for a search over it")
    axes = [[f"{key}={value}" for value in o.sweep_string_iterator()] for key, o in swept.items()]
    request.trials = compose_all(composer, fixed, [list(lines) for lines in itertools.product(*axes)])
    for trial in request.trials * (options.margin is not None):
        if found := re.search(r"(\w+): .*\{\.*seed\}", OmegaConf.to_yaml(composer(trial.overrides))):
            raise ConfigError(f"{found[1]} depends on the seed, over which a race compares: give it a value of its own")
    return request


def _name(master: Any, swept: dict[str, Override], overrides: dict[str, Override]) -> str:
    """A sweep's name, which longer lists and later versions keep: preset or swept keys, and a digest of the rest."""
    rest: Any = OmegaConf.to_container(master, resolve=False)
    rest = {key: value for key, value in rest.items() if key not in (*SECTIONS_BESIDE, *swept)}
    for key in (*WITHOUT_IDENTITY, *swept, *(k for k, v in ADDED.items() if OmegaConf.select(master, k) == v)):
        section, _, name = key.partition(".")
        if name and isinstance(rest.get(section), dict):
            rest[section].pop(name, None)
    beside = ("hydra", "sweep.", "engine", "tracker")  # not a preset's name
    ours = {key: str(o.get_value_element_as_str()) for key, o in overrides.items()
            if not key.startswith(beside) and key not in (*WITHOUT_IDENTITY, *swept)}  # fmt: skip
    words = [ours["sweep"]] if "sweep" in ours else [short_key(key) for key in swept] or ["sweep"]
    return "_".join(dict.fromkeys(words))[:60] + "-" + digest([rest, ours], 6)


def compose_all(composer: Composer, fixed: Sequence[str], swept: Sequence[Sequence[str]]) -> list[Trial]:
    """Every trial of the sweep (``swept``: overrides of each). Raises ConfigError, a line for each that cannot run."""
    trials: list[Trial] = []
    refused: dict[str, list[str]] = {}
    with Progress("composing", len(swept), quiet=len(swept) < 500, unit="trials") as bar:
        for lines in swept:
            dropped: dict[str, str] = {}
            try:
                config = from_omegaconf(composer([*fixed, *lines]), dropped, composer.fetch)
                trials.append(Trial(config, [*fixed, *lines], label(without_idle(config, lines)), dropped=dropped))
            except (ConfigError, HydraException, OmegaConfBaseException) as error:
                refused.setdefault(explain(error), []).append(label(lines))
            bar.advance(1)
    if not refused:
        return trials
    said = [f"{len(swept) - len(trials)} of {len(swept)} trials cannot run, so none is started:"]
    for message, labels in refused.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        said.append(f"  {message}   [{labels[0] or 'as given'}{more}]")
    for key in {key_of(line) for lines in swept for line in lines}.intersection(PATHS):
        said.append(f"  ({key}: a comma separates values; a name with a comma is given in quotes, \"{key}='a,b'\")")
    raise ConfigError("\n".join(said))


def search_space(
    composer: Composer, swept: dict[str, Override], fixed: list[str], trials: int
) -> tuple[dict[str, Any], list[Trial]]:
    """What a search may choose from, as its plan keeps it; and the trials at both ends. Raises ConfigError."""
    if "seed" in swept:  # the best seed is luck
        raise ConfigError("seed cannot be searched: give it one value")
    if not swept:
        raise ConfigError("nothing is searched: give a range, as 'optimizer.lr=tag(log,interval(1e-4,1e-2))'")
    try:
        import optuna.storages.journal  # noqa: F401  (an older one lacks it)
    except ImportError as error:
        raise ConfigError(f"sweep.trials={trials} needs Optuna 4 ({error}): pip install 'lora_vit[search]'") from None
    space = {key: _choices(composer, o, fixed) for key, o in swept.items()}
    groups = [[[key, text] for text, _ in of["choices"]] for key, of in space.items() if of["group"]]
    bases = []
    for options in itertools.product(*groups):
        plain: Any = OmegaConf.to_container(composer.exactly([*fixed, *map("=".join, options)]), resolve=False)
        for key, before in ADDED.items():  # a later version's settings leave the study as it is
            section, _, name = key.partition(".")
            if plain[section][name] == before and f"{name}}}" not in str(plain):  # none refers to it
                del plain[section][name]
        ours = {key: part for key, part in plain.items() if key not in SECTIONS_BESIDE}  # how it runs may change later
        bases.append([list(options), OmegaConf.to_yaml(ours)])
    ends = compose_all(composer, fixed, [
        [f"{key}={of[end] if 'choices' not in of else of['choices'][i][0]}" for key, of in space.items()]
        for i, end in ((0, "low"), (-1, "high"))
    ])  # fmt: skip
    dead = [idle(trial.config) for trial in ends]
    for key in [key for key in space if all(key in done for done in dead)]:
        raise ConfigError(f"{key} has no effect with {dead[0][key][1]}: leave it out, or change that")
    own = [line for line in fixed if not line.startswith(("sweep.", "engine"))]
    search = {"trials": trials, "space": space, "bases": bases, "fixed": own, "tracker": ends[0].config.tracker}
    return search | {"cwd": os.getcwd()}, ends  # a worker may be started in another folder


def _choices(composer: Composer, override: Override, fixed: Sequence[str]) -> dict[str, Any]:
    """The values of a key: ``choices`` (text and value), or ``low`` and ``high`` of a range."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        if not (0 if log else -math.inf) < low <= high < math.inf:  # type: ignore[operator]
            key, lower = override.key_or_group, "a lower end above 0" if log else "the lower end"
            raise ConfigError(f"{key}=interval({low:g},{high:g}) cannot be searched: give {lower} first, then a higher")
        if integer := isinstance(OmegaConf.select(composer(fixed), override.key_or_group), int):
            low, high = int(low or 0), int(high or 0)  # Hydra reads 1 as 1.0
        return {"low": low, "high": high, "log": log, "integer": integer, "group": False,
                "step": 1 if integer else None}  # fmt: skip
    choices = [[text, composer.parse(f"{override.get_key_element()}={text}").value()]
               for text in override.sweep_string_iterator()]  # fmt: skip
    return {"choices": choices, "group": not composer.changes_a_value(override)}


def first_of(lines: Sequence[str], *prefixes: str) -> str:
    """The first override of keys that begin so; empty if there is none."""
    return next((line for line in lines if line.lstrip("+~").startswith(prefixes)), "")


def refuse_without_effect(master: Any, options: SweepConfig, swept: Sequence[str], given: Sequence[str]) -> None:
    """Raise ConfigError if a setting of Hydra's or of the sweep's would do nothing, or cannot be."""
    race, search = options.margin is not None, options.trials is not None
    for wrong, why in (
        (first_of(swept, *SECTIONS_BESIDE), "cannot be swept: give one value (trackers: tracker=[tensorboard,mlflow])"),
        (first_of(given, "hydra.run."), "has no effect on a sweep: give sweep.name or hydra.sweep.dir"),
        (first_of(given, "hydra/launcher", "hydra.launcher"),
         "has no effect beside this sweeper: choose engine=local, slurm or ray, or hydra/sweeper=basic"),
        (first_of(given, "hydra.sweep.subdir", "hydra.job.chdir", "hydra.job.env_set", "hydra.output_subdir",
                  "hydra.verbose", "hydra.job_logging", "hydra/job_logging")
         or ("hydra.callbacks" if master.hydra.callbacks else ""),
         "has no effect on packed trials: leave it out, or choose hydra/sweeper=basic"),
        (not race and first_of(given, "sweep.first_seeds", "sweep.most_seeds"),
         "has no effect without sweep.margin, which makes the sweep a race"),
        (race and "seed" in swept and "seed",
         "cannot be swept in a race (sweep.margin), which chooses its seeds: give its first one, seed=0"),
        (race and search and f"sweep.trials={options.trials}", "makes a search, sweep.margin a race: give one of them"),
        (not options.wait and master.engine.name != "slurm" and "sweep.wait=false",
         "needs engine=slurm: only workers on Slurm outlive the command"),
        (options.dry_run and search and "sweep.dry_run=true", "cannot say what a search will suggest: leave it out"),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(f"{wrong} {why}")


def refuse_misread_paths(lines: Sequence[str]) -> None:
    """Raise ConfigError if Hydra would read another text than a given name of a file or folder, or a number as true."""
    for override in OverridesParser.create().parse_overrides(list(lines)):
        key, swept = override.key_or_group, override.is_sweep_override()
        if SAYS.get(key) == "true or false":
            for value in override.sweep_iterator() if swept else [override.value()]:
                if type(value) is int and value not in (0, 1):
                    raise ConfigError(wrong_type(str(value), key))
        elif key in PATHS and not swept:
            value, text = override.value(), override.get_value_string()
            if value == "":  # as of a shell's variable that is not set; it would mean the current folder
                raise ConfigError(f"{key} has no value: give one, or leave it out")
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{override.input_line} is read as {value!r}: {quoted(key, text)}")


def quoted(key: str, text: str) -> str:
    """How to give a name or a pattern that Hydra's grammar reads otherwise."""
    return f"give it in quotes, \"{key}={QuotedString(text, Quote.single).with_quotes()}\""


def no_option(option: str, others: str | None) -> str:
    """What is said of a group's option that is not there; of one in a list, Hydra names no ``others``."""
    group, _, name = option.rpartition("/")
    ours = Path(str(files("lora_vit.conf")), group).glob("*.yaml")
    known = others.split() if others else sorted(path.stem for path in ours)
    return f"'{option}' does not exist{nearest(name, known)} (one of: {', '.join(known)})"


_ANSWERS: tuple[tuple[str, Any], ...] = (  # what Hydra's messages say, and what ours say
    (r"Could not override '(hydra[^']*)'", "unknown key '{0}' (see --cfg hydra)".format),
    (r"Could not override '([^']+)'", unknown_key),
    (r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'",
     "{0} names several values: add -m for a sweep (of a range sweep.trials too), or write a list as key=[a,b]".format),
    (r"Could not (?:find|load) '([^']+)'(?:[\s\S]*?Available options in '[^']+':((?:\n\t.+)*))?", no_option),
    (r"Key '([^']+)' not in 'RootConfig'[\s\S]*In '\1/",
     "its first line has to be: # @package _global_ (in UTF-8 without a byte order mark)".format),
    (r"not in '[A-Z]\w+Config'\s+full_key: (\S+)", unknown_key),
    (r"does not support deletion\s+full_key: (\S+)",
     "{0} cannot be removed: give it a value, or null where it may have none".format),
    (r"is not a ListConfig, list or tuple\.\s+full_key: (\S+)", "{0} is a list: give it as [a,b]".format),
    (r"(?:(?:[Vv]alue|to string:) '(.*?)'(?: of| is| for|\s).*|is not Optional)\s+full_key: (\S+)", wrong_type),
)  # fmt: skip


def seen_in(error: BaseException, name: str) -> Any:
    """What Hydra's code has under a name where an error comes from, which its text lacks; None if nothing."""
    seen = (frame.f_locals.get(name) for frame, _ in traceback.walk_tb(error.__traceback__))
    return next(filter(None, seen), None)


def explain(error: BaseException) -> str:
    """One line of a Hydra or OmegaConf error: the key, the value and the remedy."""
    chain: list[Any] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, ConfigError):
            return str(link)
        if isinstance(link, OverrideParseException):
            key, _, text = str(link.override).partition("=")
            remedy = f": {quoted(key, text)}" if key.lstrip("+") in (*PATHS, "data.group") else ""
            remedy = ": end lines without \\r, as Unix does" if "\r" in text else remedy
            return f"cannot read the override {link.override!r} ({link.message.splitlines()[0]}){remedy}"
        if mark := getattr(link, "problem_mark", None):  # of YAML
            return f"{mark.name}, line {mark.line + 1}: {link.problem}"
        if isinstance(link, (YAMLError, UnicodeDecodeError)):
            return f"{seen_in(link, 'full_path') or 'a YAML file'}: {one_line(link)}: save it as UTF-8"
    text = "\n".join(map(str, reversed(chain)))  # the cause first
    place = "".join(f"{name}.yaml: " for name in re.findall(r"In '([^']+)': \w+ raised while", text)[:1])
    for pattern, answer in _ANSWERS:
        if found := re.search(pattern, text):
            return place + str(answer(*found.groups()))
    if found := re.search(r"full_key: (\S+)", text):
        reason = next(str(link) for link in reversed(chain) if found[0] in str(link)).splitlines()[0]
        return f"{place}{found[1]}: {reason}"
    lines = [line for link in chain for line in str(link).splitlines() if line and not line.startswith("In '")]
    return lines[0] if lines else type(error).__name__
