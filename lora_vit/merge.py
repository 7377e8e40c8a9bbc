"""Merge a trained adapter into weights of the backbone's names: ``python -m lora_vit.merge FOLDER --out FILE``."""

from __future__ import annotations

import json
from pathlib import Path

from lora_vit.commands import check_out, completed_record, recorded_config, trial_parser
from lora_vit.errors import RecordError, run_command
from lora_vit.files import replacing


def merge_folder(folder: Path, out: Path, weights: str | None, device: str) -> int:
    """Write the merged weights after comparing them, on made images, with base and adapter apart."""
    check_out(out, "--out", ".safetensors")
    if out.exists():  # perhaps the adapter, or the base
        raise RecordError(f"--out {out} is there already: give a new file")
    config = recorded_config(completed_record(folder), device, weights)
    from safetensors.torch import save

    from lora_vit.build import choose_device
    from lora_vit.distributed import Process
    from lora_vit.interop import compare, open_trial
    from lora_vit.lora.backbones import SIZES

    trial = open_trial(folder, config, choose_device(device, Process()))
    compare(trial, trial.merged, f"{folder}: the merged model")
    metadata = {"lora_vit": json.dumps(trial.about, sort_keys=True)}  # with several entries the bytes are not stable
    with replacing(out) as file:
        file.write(save({name: t.contiguous() for name, t in trial.merged.state_dict().items()}, metadata))
    sizes = {key: trial.adapter.card["base"][key] for key in (SIZES if trial.of_torchvision else ("image_size",))}
    sizes["num_classes"] = len(trial.about["class_names"])
    arguments = ", ".join(f"{key}={value}" for key, value in sizes.items())
    print(f"import safetensors.torch, {config.model.library}")
    if trial.of_torchvision:
        print(f"model = torchvision.models.VisionTransformer({arguments})")
    else:
        print(f"model = timm.create_model({config.model.name!r}, {arguments.replace('image_size', 'img_size')})")
    print(f"model.load_state_dict(safetensors.torch.load_file({str(out)!r}))")
    return 0


def main() -> None:
    """Command-line entry."""
    parser = trial_parser("merge", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    args = parser.parse_args()
    run_command(lambda: merge_folder(args.folder, args.out, args.weights, args.device))


if __name__ == "__main__":
    main()
