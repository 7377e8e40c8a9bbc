"""``lora-vit fetch``: bring a model's weights and the images here, before jobs that have no network."""

import argparse

from lora_vit.cli import main


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="as after `lora-vit train`: model=vit_b_16 data=cifar10")


def run(args: argparse.Namespace) -> int:
    from lora_vit.api import compose
    from lora_vit.build import prepare  # imports torch

    config = compose(args.overrides)
    prepare([config])
    print(f"here now: model={config.model.name} model.weights={config.model.weights} data={config.data.name}")
    return 0


if __name__ == "__main__":
    main("fetch")
