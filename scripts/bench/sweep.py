"""What packing gains: whole sweeps in five ways, the packing curve of three models, and composing many trials.

    python scripts/bench/sweep.py ways [--rounds 1]
    python scripts/bench/sweep.py curve [--rounds 5] [--sizes 1,2,4,8]
    python scripts/bench/sweep.py compose
    python scripts/bench/sweep.py engines [--rounds 1]

``ways`` runs the 24 trials of ``sweep=quickstart`` as a user would: packed (in as many processes as it takes by
itself, and in one), by Hydra's basic launcher, by its joblib launcher (``pip install hydra-joblib-launcher``; two
processes) and as one process for each trial, taking turns. ``engines`` runs them in two workers: local ones, jobs of a
Slurm that is there (``scripts/one_node_slurm.sh``) and tasks of a Ray of its own, and as one job or task for each trial
by Hydra's launchers for these two.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import interleaved, machine, peak_memory, report
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode

from lora_vit.build import build_setup
from lora_vit.compose import from_omegaconf, register_schema
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


def composed(*overrides: str) -> TrialConfig:
    with initialize_config_module("lora_vit.conf", version_base="1.3"):
        return from_omegaconf(compose("config", overrides=list(overrides)))


def ways(rounds: int) -> list[dict[str, Any]]:
    """Seconds of the whole sweep, command to end."""
    train = [sys.executable, "-m", "lora_vit.train"]
    with tempfile.TemporaryDirectory() as scratch:
        commands = {
            "packed": [[*train, "sweep=quickstart", "sweep.name=packed"]],
            "packed, one process": [[*train, "sweep=quickstart", "sweep.workers=1", "sweep.name=one"]],
            "hydra/launcher=basic": [[*train, "sweep=quickstart", "hydra/launcher=basic", "sweep.name=basic"]],
            "separate processes": [],
        }
        try:
            import hydra_plugins.hydra_joblib_launcher  # noqa: F401

            joblib = [*train, "sweep=quickstart", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sweep.name=job"]
            commands["hydra/launcher=joblib, 2 jobs"] = [joblib]
        except ImportError:
            print("no joblib launcher: pip install hydra-joblib-launcher", file=sys.stderr)
        for seed, lr in itertools.product((0, 1, 2), ("1e-3", "2e-3")):
            shared = ["experiment=quickstart", f"seed={seed}", f"optimizer.lr={lr}"]
            for rank in (1, 8):
                commands["separate processes"].append([*train, *shared, f"lora.rank={rank}", f"lora.alpha={4 * rank}"])
            commands["separate processes"] += [[*train, *shared, "lora=none"], [*train, *shared, "lora=full"]]
        return in_turns(commands, scratch, rounds)


def engines(rounds: int) -> list[dict[str, Any]]:
    """The same for workers and trials that a cluster starts."""
    train = [sys.executable, "-m", "lora_vit.train", "sweep=quickstart", "sweep.name=s"]
    slurm, ray = ["hydra.launcher.cpus_per_task=1"], ["+hydra.launcher.ray.init.num_cpus=2"]
    commands = {
        "2 local workers": [[*train, "sweep.workers=2"]],
        "packed_slurm, 2 workers": [[*train, "sweep.workers=2", "hydra/launcher=packed_slurm", *slurm]],
        "packed_ray, 2 workers": [[*train, "sweep.workers=2", "hydra/launcher=packed_ray"]],
        "submitit_slurm, a job a trial": [[*train, "hydra/launcher=submitit_slurm", *slurm]],
        "ray, a task a trial": [[*train, "hydra/launcher=ray", *ray]],
    }
    with tempfile.TemporaryDirectory() as scratch:
        return in_turns(commands, scratch, rounds)


def in_turns(commands: dict[str, list[list[str]]], scratch: str, rounds: int) -> list[dict[str, Any]]:
    """Run each way's commands in a folder of its own, one way after the other; compared with the first."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, lines in commands.items():
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                for line in lines:
                    subprocess.run(line, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    base, *_ = seconds.values()
    return [
        {
            "way": name,
            "min s": min(values),
            "median s": statistics.median(values),
            "of the first": statistics.median(a / b for a, b in zip(values, base, strict=True)),
            "s more a trial": statistics.median((a - b) / TRIALS for a, b in zip(values, base, strict=True)),
        }
        for name, values in seconds.items()
    ]


def curve(rounds: int, sizes: list[int]) -> list[dict[str, Any]]:
    """Time of a training step per trial, and memory beyond the model's, for packs of several sizes."""
    rows = []
    for name, overrides in MODELS.items():
        configs = [composed(*overrides, "lora.rank=8", f"optimizer.lr={lr}") for lr in (1e-4, 3e-4, 1e-3, 3e-3)]
        configs = [c for c in configs for _ in range(2)]
        setup = build_setup(configs[0], Process())

        def step_of(k: int, setup: Any = setup, configs: list[TrialConfig] = configs) -> Any:
            pack = Pack([TrialRun.without_files(c) for c in configs[:k]], setup)
            rates = pack.learning_rates()

            def step() -> None:
                pack.step_in_epoch = 0
                pack.step(rates[0], False)

            return step

        # a pack's adapters hang on the shared trunk, so packs of different sizes take turns by being made anew
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


def composing() -> list[dict[str, Any]]:
    """Seconds to compose sweeps of 24, 200 and 1,000 trials, by Hydra and by us."""
    from lora_vit.compose import Composer, compose_all

    loader = ConfigLoaderImpl(create_config_search_path("pkg://lora_vit.conf"))
    master = loader.load_configuration("config", ["experiment=quickstart"], RunMode.MULTIRUN)
    rows = []
    for count in (24, 200, 1000):
        lines = [
            ["experiment=quickstart", f"lora.rank={1 + i % 8}", f"optimizer.lr={1e-4 * (1 + i // 8 % 5)}", f"seed={i}"]
            for i in range(count)
        ]
        composer = Composer(loader, master)
        start = time.perf_counter()
        for line in lines[:24]:
            composer.exactly(line)
        exact = (time.perf_counter() - start) / 24 * count
        start = time.perf_counter()
        jobs = compose_all(loader, master, lines)
        quick = time.perf_counter() - start
        assert len({job.trial_id for job in jobs}) == count
        rows.append({"trials": count, "Hydra s (of 24, scaled)": exact, "ours s, validated": quick})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ways", "curve", "compose", "engines"))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--sizes", default="1,2,4,8")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    register_schema()
    if args.what in ("ways", "engines"):
        rows = (ways if args.what == "ways" else engines)(args.rounds or 1)
    elif args.what == "curve":
        rows = curve(args.rounds or 5, [int(k) for k in args.sizes.split(",")])
    else:
        rows = composing()
    report(rows, machine(), args.out)


if __name__ == "__main__":
    main()
