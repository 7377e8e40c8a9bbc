"""A trained trial in the files of PEFT, HF transformers, timm, ONNX and torch.export, and its logits from these.

Each format has a writer and a reader, which uses the other library and the files alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_vit import randomness
from lora_vit.build import ModelFactory
from lora_vit.config import TrialConfig
from lora_vit.errors import ConfigError
from lora_vit.lora.adapter import Adapter, bind, merged_state_dict, put_on, read_adapter
from lora_vit.lora.backbones import OF_HEADS, SIZES, TORCHVISION, last_layer, new_backbone, trunk_state
from lora_vit.models.names import timm_name, translate

OPSET = 20
"""Of ONNX: the first with GELU as one operator."""
TOLERANCE = 1e-3
"""Largest difference of a logit, in fp32, relative to the largest logit (or 1): both sides round each product."""
CHECKED = 16
"""Made images that are classified both ways before anything is written."""


@dataclass(frozen=True)
class Trial:
    """A trial in fp32.

    Attributes:
        adapter: what was trained.
        plain: the backbone's own model with the base's weights and the trial's head.
        merged: the same with the adapter in its weights.
        adapted: base and adapter apart, as it was trained.
        about: class names, name of the model, and how images are prepared.
    """

    adapter: Adapter
    plain: nn.Module
    merged: nn.Module
    adapted: nn.Module
    about: dict[str, Any]

    @property
    def of_torchvision(self) -> bool:
        """Whether the backbone is torchvision's; else it is timm's."""
        return self.adapter.card["base"]["architecture"] == TORCHVISION


def open_trial(folder: Path, config: TrialConfig, device: torch.device) -> Trial:
    """Read a trial's adapter and bind it to its base. Raises ConfigError where they do not belong together."""
    adapter = read_adapter(folder)
    names = adapter.card["class_names"]
    factory = ModelFactory(config, len(names), device, torch.float32)
    bind(adapter, factory.base)
    if factory.note:
        print(factory.note)
    state = merged_state_dict(factory.original, adapter)
    heads = {name: t for name, t in state.items() if name.startswith(OF_HEADS)}
    merged, plain = (new_backbone(factory.base, len(names)) for _ in range(2))
    merged.load_state_dict(state)
    plain.load_state_dict({**factory.original.state_dict(), **heads})
    put_on(factory.original, adapter)
    about = {"class_names": names, "model": config.model.name, **factory.inputs}
    plain, merged, adapted = (model.to(device).eval() for model in (plain, merged, factory.original))
    return Trial(adapter, plain, merged, adapted, about)


def compare(trial: Trial, others: Callable[[Tensor], Tensor], what: str) -> None:
    """Print how far the logits of ``what`` are from the trial's on made images. Raises ConfigError where too far."""
    side, device = trial.about["image_size"], next(trial.adapted.parameters()).device
    images = torch.rand(CHECKED, 3, side, side, generator=randomness.generator("merge")).to(device) * 4 - 2
    with torch.no_grad():
        ours, theirs = trial.adapted(images), others(images)
    largest = float((ours - theirs).abs().max())
    changed = int((ours.argmax(-1) != theirs.argmax(-1)).sum())
    print(f"largest logit difference {largest:.2e}, {changed} of {CHECKED} predictions changed on made images")
    if not largest <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise ConfigError(f"{what} differs by {largest:.2e}; nothing written")


def _save(trial: Trial, model: Any, out: Path) -> None:
    """Write a model of HF or timm as its library does, with class names and how images are prepared."""
    about, side = trial.about, trial.about["image_size"]
    cropped = trial.adapter.card["decoded_size"] is not None
    if hasattr(model, "pretrained_cfg"):
        from timm.models import save_for_hf

        shown = {key: about[key] for key in ("mean", "std", "interpolation")}
        shown |= {"input_size": (3, side, side), "crop_pct": 1.0, "crop_mode": "center" if cropped else "squash"}
        described = {"pretrained_cfg": shown, "label_names": about["class_names"]}
        save_for_hf(model, str(out), described, safe_serialization=True)
        return
    from transformers import ViTImageProcessor

    square = {"height": side, "width": side}
    crop = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
    model.save_pretrained(out)
    ViTImageProcessor(
        **(crop if cropped else {"size": square}),
        image_mean=about["mean"],
        image_std=about["std"],
        resample={"bilinear": 2, "bicubic": 3}[about["interpolation"]],
        do_convert_rgb=True,
    ).save_pretrained(out)


def _hf_model(trial: Trial, source: nn.Module) -> Any:
    """HF's classifier with the weights of ``source``. Raises ConfigError where HF has no class with such parts."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    state = trunk_state(source)
    found = {timm_name(name): t for name, t in state.items()}
    kind = "ViT" if "blocks.0.ls1.gamma" not in found else "Dinov2WithRegisters" if "reg_token" in found else "Dinov2"
    width, _, _, patch = found["patch_embed.proj.weight"].shape
    mlp = found["blocks.0.mlp.fc1.weight"].shape[0]
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith(".norm1.weight") for name in found),
        num_attention_heads=next(m.num_heads for m in source.modules() if hasattr(m, "num_heads")),
        image_size=trial.about["image_size"],
        patch_size=patch,
        qkv_bias="blocks.0.attn.qkv.bias" in found,
        layer_norm_eps=next((m.eps for m in source.modules() if isinstance(m, nn.LayerNorm)), 1e-6),
        id2label=dict(enumerate(trial.about["class_names"])),
        label2id={name: i for i, name in enumerate(trial.about["class_names"])},
        **({"intermediate_size": mlp} if kind == "ViT" else {"mlp_ratio": mlp // width}),
        **({"num_register_tokens": found["reg_token"].shape[1]} if "reg_token" in found else {}),
    )
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    own = {n: t for n, t in model.state_dict().items() if not n.startswith("classifier.") and "mask_token" not in n}
    translated, _ = translate(state, own)
    odd = sorted(
        name for name, _ in {(n, t.shape) for n, t in translated.items()} ^ {(n, t.shape) for n, t in own.items()}
    )
    if odd:
        what = f"{kind} differs in {odd[0]}"
        raise ConfigError(f"HF has no {trial.about['model']} ({what}): give --format timm, onnx or torch_export")
    head: Any = last_layer(source)
    weight = head.weight
    if kind != "ViT":  # its classifier reads the mean of the patches as well
        weight = torch.cat([weight, torch.zeros_like(weight)], 1)
    model.load_state_dict({**translated, "classifier.weight": weight, "classifier.bias": head.bias}, strict=False)
    return model


def _timm_model(trial: Trial, source: nn.Module) -> Any:
    """timm's model with the weights of ``source``: itself, or a ViT with torchvision's sizes."""
    if not trial.of_torchvision:
        return source
    import timm

    size, patch, depth, heads, width, mlp = (trial.adapter.card["base"][key] for key in SIZES)
    sizes = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    classes = len(trial.about["class_names"])
    model = timm.create_model("vit_base_patch16_224", **sizes, mlp_ratio=mlp / width, num_classes=classes)
    translated, _ = translate(trunk_state(source), trunk_state(model))
    head: Any = last_layer(source)
    model.load_state_dict({**translated, "head.weight": head.weight, "head.bias": head.bias})
    return model.eval()


def _read_model(folder: Path) -> Any:
    """HF's or timm's model from its folder."""
    if "architectures" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification.from_pretrained(folder)
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _write_hf(trial: Trial, out: Path) -> None:
    _save(trial, _hf_model(trial, trial.merged), out)


def _write_timm(trial: Trial, out: Path) -> None:
    _save(trial, _timm_model(trial, trial.merged), out)


def _write_peft(trial: Trial, out: Path) -> None:
    """The adapter, and under ``base/`` HF's model that it is for, or timm's where the backbone is timm's."""
    import peft

    lora, scaling = trial.adapter.card["lora"], trial.adapter.scaling
    if lora["method"] != "lora" or lora["bias"] != "none":
        what = f"lora={lora['method']}" if lora["method"] != "lora" else f"lora.bias={lora['bias']}"
        raise ConfigError(f"{what} trains more than adapters, which PEFT's files hold: give --format timm or hf")
    base = (_hf_model if trial.of_torchvision else _timm_model)(trial, trial.plain)
    _save(trial, base, out / "base")
    layers, r = _by_layer(trial, base), lora["rank"]
    heads = [name for name, module in base.named_children() if isinstance(module, nn.Linear)]
    state = {name: t for name, t in base.state_dict().items() if name.split(".")[0] in heads}
    for layer, parts in layers.items():
        lora_B = torch.zeros(base.get_submodule(layer).out_features, len(parts) * r)
        for i, (_, row, B) in enumerate(parts):
            lora_B[row : row + len(B), i * r : (i + 1) * r] = B
        state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = torch.cat([A for A, _, _ in parts]), lora_B
    wider = {layer: len(parts) * r for layer, parts in layers.items() if len(parts) > 1}
    config = peft.LoraConfig(
        r=r,
        lora_alpha=scaling * r,
        lora_dropout=lora["dropout"],
        target_modules=list(layers),
        rank_pattern=wider,
        alpha_pattern={layer: scaling * rank for layer, rank in wider.items()},
        modules_to_save=heads,
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    peft.set_peft_model_state_dict(model, {f"base_model.model.{name}": t for name, t in state.items()})
    model.save_pretrained(str(out), save_embedding_layers=False)  # "auto" looks for a vocabulary
    (out / "README.md").unlink(missing_ok=True)  # a form to be filled in


def _by_layer(trial: Trial, base: Any) -> dict[str, list[tuple[Tensor, int, Tensor]]]:
    """By linear layer of the base: of each adapter in it lora_A, the first row of its output, and lora_B."""
    modules = {timm_name(name): name.removesuffix(".weight") for name in base.state_dict()}
    found: dict[str, list[tuple[Tensor, int, Tensor]]] = {}
    for name, place, part in trial.adapter.places(trial.plain):
        fused = len(place.names) > 1
        if fused and any(bias.endswith("q_bias") for bias in place.biases):
            raise ConfigError(
                f"PEFT never calls {place.layer} of {trial.about['model']}, whose bias is apart "
                "(docs/peft_pitfalls.md): give --format timm, or train without q, k and v"
            )
        A, B = (trial.adapter.tensors[f"{name}.lora_{m}"] for m in "AB")
        whole = timm_name(place.weight)
        alone = whole.replace("qkv", "qkv"[part]) if fused else whole
        row = part * len(B) if alone not in modules else 0
        found.setdefault(modules.get(alone) or modules[whole], []).append((A, row, B))
    return found


def _read_peft(out: Path, images: Tensor) -> Tensor:
    from peft import PeftModel

    logits = PeftModel.from_pretrained(_read_model(out / "base"), out).eval()(images)
    return logits if isinstance(logits, Tensor) else logits.logits


def _write_onnx(trial: Trial, out: Path) -> None:
    modules: Iterable[Any] = trial.merged.modules()
    for module in modules:
        if hasattr(module, "fused_attn"):  # torch's exporter loses the strides of the one with a mask (BEiT's)
            module.fused_attn = False
    program: Any = torch.onnx.export(
        trial.merged,
        _example(trial),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    program.model.metadata_props["lora_vit"] = json.dumps(trial.about)
    program.save(out / "model.onnx")


def _read_onnx(out: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_torch_export(trial: Trial, out: Path) -> None:
    program = torch.export.export(trial.merged, _example(trial), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, out / "model.pt2", extra_files={"lora_vit.json": json.dumps(trial.about)})


def _example(trial: Trial) -> tuple[Tensor]:
    """Two images: of one, a graph would take the number for a constant."""
    return (torch.zeros(2, 3, *2 * [trial.about["image_size"]]),)


FORMATS: dict[str, tuple[Callable[[Trial, Path], None], Callable[[Path, Tensor], Tensor]]] = {
    "peft": (_write_peft, _read_peft),
    "hf": (_write_hf, lambda out, images: _read_model(out)(images).logits),
    "timm": (_write_timm, lambda out, images: _read_model(out)(images)),
    "onnx": (_write_onnx, _read_onnx),
    "torch_export": (_write_torch_export, lambda out, images: torch.export.load(out / "model.pt2").module()(images)),
}
"""Writer and reader of each format."""
