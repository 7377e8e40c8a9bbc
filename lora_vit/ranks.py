"""``lora-vit ranks SWEEP``: what :mod:`lora_vit.cut` does to a sweep, under a name of its own."""

from lora_vit.cli import main
from lora_vit.cut import add_arguments as add_arguments
from lora_vit.cut import run as run

if __name__ == "__main__":
    main("ranks")
