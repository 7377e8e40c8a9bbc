"""python scripts/summarize.py outputs/sweeps/NAME: the same as python -m lora_vit.summarize."""

from lora_vit.cli import main

if __name__ == "__main__":
    main("summarize")
