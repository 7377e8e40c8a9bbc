"""What packing gains: whole sweeps in five ways, the packing curve of three models, and composing many trials.

    python scripts/bench/sweep.py ways [--rounds 1]
    python scripts/bench/sweep.py curve [--rounds 5] [--sizes 1,2,4,8]
    python scripts/bench/sweep.py compose [--sizes 24,200,1000]
    python scripts/bench/sweep.py engines [--rounds 1]
    python scripts/bench/sweep.py probes data.root=DIR [--rounds 1]

``ways`` runs the 24 trials of ``sweep=quickstart`` as a user would: packed (in as many processes as it takes by
itself, and in one), by Hydra's basic sweeper, by that one with its joblib launcher (``pip install
hydra-joblib-launcher``; two processes) and as one process for each trial, taking turns. ``engines`` runs them in two
workers: local ones, jobs of a Slurm that is there (``scripts/one_node_slurm.sh``) and tasks of a Ray of its own, and as
one job or task for each trial by Hydra's launchers for these two. ``probes`` trains nine linear probes on
Tiny-ImageNet, from features and (with crops, which have none) through the trunk. ``--only TEXT`` keeps the ways or
models whose names start with it; overrides (``trainer.epochs=1``) go to every command.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import interleaved, machine, peak_memory, report

from lora_vit.api import compose
from lora_vit.build import build_setup
from lora_vit.compose import Composer, compose_all, initialized
from lora_vit.config import TrialConfig
from lora_vit.distributed import Process
from lora_vit.training.pack import Pack
from lora_vit.training.trial import TrialRun

TRIALS = 24
"""Of ``sweep=quickstart``."""

MODELS = {
    "vit_tiny 32 px (17 tokens, width 128), batch 20, fp32": ["experiment=quickstart"],
    "64 px, patch 8 (65 tokens, width 384, 6 blocks), batch 16, fp32": [
        "model=vit_tiny", "model.weights=null", "model.image_size=64", "model.hidden_dim=384", "model.mlp_dim=1536",
        "model.num_heads=6", "data=fake", "data.cache_size=64", "data.batch_size=16", "trainer.precision=fp32",
    ],
    **{
        f"vit_b_16 224 px, batch 4, {precision}": [
            "model.weights=null", "data=fake", "data.cache_size=224", "data.batch_size=4",
            f"trainer.precision={precision}",
        ] for precision in ("fp32", "bf16")
    },
}  # fmt: skip


def ways(overrides: list[str]) -> dict[str, list[list[str]]]:
    """The commands of each way."""
    train = [sys.executable, "-m", "lora_vit.train"]
    sweep, basic = [*train, "sweep=quickstart"], ["hydra/sweeper=basic", "sweep.name=s"]
    commands = {
        "packed": [[*sweep, "sweep.name=packed", *overrides]],
        "packed, one process": [[*sweep, "sweep.workers=1", "sweep.name=one", *overrides]],
        "hydra/sweeper=basic": [[*sweep, *basic, *overrides]],
        "separate processes": [],
    }
    if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher"):
        joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
        commands["hydra/launcher=joblib, 2 jobs"] = [[*sweep, *basic, *joblib, *overrides]]
    else:
        print("no joblib launcher: pip install hydra-joblib-launcher", file=sys.stderr)
    for seed, lr in itertools.product((0, 1, 2), ("1e-3", "2e-3")):
        shared = ["experiment=quickstart", f"seed={seed}", f"optimizer.lr={lr}", *overrides]
        for rank in (1, 8):
            commands["separate processes"].append([*train, *shared, f"lora.rank={rank}", f"lora.alpha={4 * rank}"])
        commands["separate processes"] += [[*train, *shared, "lora=none"], [*train, *shared, "lora=full"]]
    return commands


def engines(overrides: list[str]) -> dict[str, list[list[str]]]:
    """The same for workers and trials that a cluster starts."""
    train = [sys.executable, "-m", "lora_vit.train", "sweep=quickstart", "sweep.name=s", *overrides]
    basic = [*train, "hydra/sweeper=basic"]
    return {
        "2 local workers": [[*train, "sweep.workers=2"]],
        "engine=slurm, 2 workers": [[*train, "sweep.workers=2", "engine=slurm", "engine.cpus_per_task=1"]],
        "engine=ray, 2 workers": [[*train, "sweep.workers=2", "engine=ray"]],
        "submitit_slurm, a job a trial": [
            [*basic, "hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1"]
        ],
        "ray, a task a trial": [[*basic, "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"]],
    }


def probes(overrides: list[str]) -> dict[str, list[list[str]]]:
    """Nine linear probes of five epochs; decoding and features are part of each way.

    Nothing is erased in the second way, but it could be: so features would not do.
    """
    train = [sys.executable, "-m", "lora_vit.train", "-m", "experiment=tiny_imagenet_cpu", "lora=none"]
    nine = [*train, "optimizer.lr=1e-3,3e-3,1e-2", "seed=0,1,2", "data.cache_dir=cache", "sweep.name=s", *overrides]
    through = ["data.augment=[flip,random_erasing]", "data.random_erasing_p=1e-9"]
    return {"from features": [nine], "through the trunk": [[*nine, *through]]}


def core_seconds() -> float:
    """Those that ended processes have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def in_turns(commands: dict[str, list[list[str]]], rounds: int, trials: int) -> list[dict[str, Any]]:
    """Seconds of each way, command to end, in a folder of its own, one way after the other; compared with the first.

    Also those of a core, of all its processes: other work on the machine changes them less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    of_cores: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, lines in commands.items():
            start, used = time.perf_counter(), core_seconds()
            with tempfile.TemporaryDirectory() as folder:
                for line in lines:
                    subprocess.run(line, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
            of_cores[name].append(core_seconds() - used)
    base, *_ = seconds.values()
    base_of_cores, *_ = of_cores.values()
    return [
        {
            "way": name,
            "min s": min(values),
            "median s": statistics.median(values),
            "of the first": statistics.median(a / b for a, b in zip(values, base, strict=True)),
            "s more a trial": statistics.median((a - b) / trials for a, b in zip(values, base, strict=True)),
            "min core s": min(of_cores[name]),
            "of the first's": statistics.median(a / b for a, b in zip(of_cores[name], base_of_cores, strict=True)),
        }
        for name, values in seconds.items()
    ]


def curve(rounds: int, sizes: list[int], only: str) -> list[dict[str, Any]]:
    """Time of a training step per trial, and memory beyond the model's, for packs of several sizes."""
    rows = []
    for name, overrides in MODELS.items():
        if not name.startswith(only):
            continue
        configs = [compose([*overrides, "lora.rank=8", f"optimizer.lr={lr}"]) for lr in (1e-4, 3e-4, 1e-3, 3e-3)]
        configs = [c for c in configs for _ in range(2)]
        setup = build_setup(configs[0], Process())

        def step_of(k: int, setup: Any = setup, configs: list[TrialConfig] = configs) -> Any:
            pack = Pack([TrialRun(c) for c in configs[:k]], setup)
            rates = pack.learning_rates()

            def step() -> None:
                pack.step_in_epoch = 0
                pack.step(rates[0], False)

            return step

        # a pack's adapters hang on the shared trunk, so packs of different sizes are rebuilt at each turn
        times: dict[int, list[float]] = {k: [] for k in sizes}
        memory = {k: peak_memory(step_of(k)) for k in sizes}
        for _ in range(rounds):
            for k in sizes:
                (found,) = interleaved({"step": step_of(k)}, 3).values()
                times[k].append(min(found))
        for k in sizes:
            per_trial = [t / k for t in times[k]]
            rows.append(
                {
                    "model": name,
                    "K": k,
                    "min ms per trial-step": 1e3 * min(per_trial),
                    "median ms": 1e3 * statistics.median(per_trial),
                    "gain over K = 1": statistics.median(
                        a / b for a, b in zip(times[sizes[0]], per_trial, strict=True)
                    ),
                    "MB of a step": memory[k] / 2**20,
                }
            )
    return rows


def composing(counts: list[int]) -> list[dict[str, Any]]:
    """Seconds to compose sweeps of so many trials, by Hydra and by us."""
    rows = []
    for count in counts:
        lines = [
            ["experiment=quickstart", f"lora.rank={1 + i % 8}", f"optimizer.lr={1e-4 * (1 + i // 8 % 5)}", f"seed={i}"]
            for i in range(count)
        ]
        with initialized():
            composer = Composer("config", [])
            start = time.perf_counter()
            for line in lines[:24]:
                composer.exactly(line)
            exact = (time.perf_counter() - start) / min(24, count) * count
            start = time.perf_counter()
            trials = compose_all(composer, [], lines)
            quick = time.perf_counter() - start
        assert len({trial.trial_id for trial in trials}) == count
        rows.append({"trials": count, "Hydra s (of 24, scaled)": exact, "ours s, validated": quick})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ways", "curve", "compose", "engines", "probes"))
    parser.add_argument("overrides", nargs="*", help="of the sweep's commands")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--sizes", help="of packs (1,2,4,8), or of composed sweeps (24,200,1000)")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args()
    if made := {"ways": ways, "engines": engines, "probes": probes}.get(args.what):
        commands = made(args.overrides)
        trials = 9 if args.what == "probes" else TRIALS
        rows = in_turns({k: v for k, v in commands.items() if k.startswith(args.only)}, args.rounds or 1, trials)
    elif args.what == "curve":
        rows = curve(args.rounds or 5, [int(k) for k in (args.sizes or "1,2,4,8").split(",")], args.only)
    else:
        rows = composing([int(k) for k in (args.sizes or "24,200,1000").split(",")])
    report(rows, machine(), args.out)


if __name__ == "__main__":
    main()
