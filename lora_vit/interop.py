"""A trained trial in the files of PEFT, HF transformers, timm, ONNX and torch.export, and its logits from these."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_vit.config import ADAPTED, SIZES
from lora_vit.data.preprocessing import ABOUT
from lora_vit.errors import ConfigError, one_line
from lora_vit.lora.adapter import Adapter, put_on
from lora_vit.lora.backbones import head_name, last_layer, places_of, sizes_of, trunk_state
from lora_vit.lora.inject import chosen_places
from lora_vit.models.names import timm_name, translate
from lora_vit.trained import TrainedModel


def write(form: str, trained: TrainedModel, out: Path) -> None:
    """Write a trial into a folder. Raises ConfigError for a model that the other library lacks, or that one's error."""
    about = json.dumps(trained.about)
    (out / ABOUT).write_text(about, encoding="utf-8")
    if form == "peft":
        return _write_peft(trained, out)
    if form in ("hf", "timm"):
        return _save(trained, (_hf_model if form == "hf" else _timm_model)(trained, trained.merged), out)
    model, side = trained.merged, trained.image_size
    images = torch.zeros(2, 3, side, side)  # of one, a graph would take the number for constant
    if form == "torch_export":
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        return torch.export.save(exported, out / "model.pt2", extra_files={ABOUT: about})
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # torch's exporter loses the strides of the one with a mask (BEiT's)
            module.fused_attn = False
    options: Any = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
    # opset 20 is the first with GELU as one operator
    program: Any = torch.onnx.export(model, (images,), dynamo=True, verbose=False, opset_version=20, **options)
    program.model.metadata_props["lora_vit"] = about
    program.save(out / "model.onnx")


def opened(form: str, out: Path) -> Callable[[Tensor], Tensor]:
    """What the other library makes of images, [B, C].

    By the files that :func:`write` left and nothing else, and by the lines in docs/interop.md.
    """
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
        return lambda x: torch.tensor(session.run(None, {"images": x.numpy()})[0])
    if form == "torch_export":
        return torch.export.load(out / "model.pt2").module()
    place = out / "base" if form == "peft" else out
    if "architectures" in json.loads((place / "config.json").read_text(encoding="utf-8")):  # HF's
        from transformers import AutoModelForImageClassification

        model: Any = AutoModelForImageClassification.from_pretrained(place)
    else:
        import timm

        model = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
    if form == "peft":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, out).eval()
    return lambda images: getattr(found := model(images), "logits", found)


def _hf_model(trained: TrainedModel, source: nn.Module) -> Any:
    """HF's classifier with the weights of ``source``. Raises ConfigError where HF has no class with such parts."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    state, classes = trunk_state(source), trained.class_names
    found = {timm_name(name): t for name, t in state.items()}
    kind = "ViT" if "blocks.0.ls1.gamma" not in found else "Dinov2WithRegisters" if "reg_token" in found else "Dinov2"
    width, _, _, patch = found["patch_embed.proj.weight"].shape
    depth, mlp = len(places_of(source)), found["blocks.0.mlp.fc1.weight"].shape[0]
    heads = next(m.num_heads for m in source.modules() if hasattr(m, "num_heads"))
    eps = next((m.eps for m in source.modules() if isinstance(m, nn.LayerNorm)), 1e-6)
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "patch_size": patch}
    sizes |= {"intermediate_size": mlp} if kind == "ViT" else {"mlp_ratio": mlp // width}
    sizes |= {"num_register_tokens": found["reg_token"].shape[1]} if "reg_token" in found else {}
    labels: Any = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    others = {"image_size": trained.image_size, "qkv_bias": "blocks.0.attn.qkv.bias" in found, "layer_norm_eps": eps}
    config = getattr(transformers, f"{kind}Config")(**sizes, **others, **labels)
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    own = {n: t for n, t in model.state_dict().items() if not n.startswith("classifier.") and "mask_token" not in n}
    translated, _ = translate(state, own)
    shapes, own_shapes = ({(name, t.shape) for name, t in tensors.items()} for tensors in (translated, own))
    if odd := sorted(name for name, _ in shapes ^ own_shapes):
        name = f"{trained.model.name} ({kind} differs in {odd[0]})"
        raise ConfigError(f"HF has no {name}: give --format timm, onnx or torch_export")
    head: Any = last_layer(source)  # Dinov2's classifier reads the mean of the patches as well
    weight = head.weight if kind == "ViT" else torch.cat([head.weight, torch.zeros_like(head.weight)], 1)
    model.load_state_dict({**translated, "classifier.weight": weight, "classifier.bias": head.bias}, strict=False)
    return model


def _timm_model(trained: TrainedModel, source: nn.Module) -> Any:
    """timm's model with the weights of ``source``: itself, or a ViT with torchvision's sizes."""
    if trained.model.library != "torchvision":
        return source
    import timm

    size, patch, depth, heads, width, mlp = (trained.adapter.card["base"][key] for key in SIZES)
    sizes = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    head: Any = last_layer(source)
    model = timm.create_model("vit_base_patch16_224", **sizes, mlp_ratio=mlp / width, num_classes=head.out_features)
    translated, _ = translate(trunk_state(source), trunk_state(model))
    model.load_state_dict({**translated, "head.weight": head.weight, "head.bias": head.bias})
    return model.eval()


def _write_peft(trained: TrainedModel, out: Path) -> None:
    """The adapter, and under ``base/`` the model that it is for: HF's, or timm's where the backbone is timm's."""
    import peft

    tensors, card = trained.adapter
    lora, scaling = card["lora"], card["effective_scaling"]
    adapted, dora = lora["method"] in ADAPTED, lora["method"] == "dora"
    if not adapted or lora["bias"] != "none":
        what = f"lora.bias={lora['bias']}" if adapted else f"lora={lora['method']}"
        raise ConfigError(f"{what} trains more than adapters, which PEFT's files hold: give --format timm or hf")
    plain = copy.deepcopy(trained.merged)  # with the base's own weights again
    plain.load_state_dict(trunk_state(trained.base), strict=False)
    base = (_hf_model if trained.model.library == "torchvision" else _timm_model)(trained, plain)
    _save(trained, base, out / "base")
    heads = [name for name, module in base.named_children() if isinstance(module, nn.Linear)]
    state = {name: t for name, t in base.state_dict().items() if name.split(".")[0] in heads}
    r, ranks, names = trained.adapter.columns, dict[str, int](), dict[str, str]()
    for place in chosen_places(trained.merged, lora["targets"], lora["blocks"]):
        if place.bias_apart and set(lora["targets"]) & set(place.names):
            what = f"PEFT never calls {place.layer} of {trained.model.name}, whose bias is apart"
            raise ConfigError(f"{what} (docs/peft_pitfalls.md): give --format timm, or train without q, k and v")
        names |= zip(_parts(place.weight), place.names.values(), strict=True)
    for layer, module in base.named_modules():
        parts = [names.get(weight, "") for weight in _parts(f"{layer}.weight")]
        own = [part for part in parts if f"{part}.lora_A" in tensors]
        if own:  # of a fused layer block by block, without rows in A for parts that are not adapted
            nothing, norms = torch.zeros(len(module.weight) // len(parts), 0), module.weight.detach().norm(dim=1)
            lora_B = torch.block_diag(*(tensors.get(f"{part}.lora_B", nothing) for part in parts))
            state |= {f"{layer}.lora_A.weight": torch.cat([tensors[f"{part}.lora_A"] for part in own])}
            state |= {f"{layer}.lora_B.weight": lora_B}
            each = zip(parts, norms.chunk(len(parts)), strict=True)
            magnitude = torch.cat([tensors.get(f"{part}.lora_magnitude", norm) for part, norm in each])
            state |= {f"{layer}.lora_magnitude_vector": magnitude} if dora else {}
            ranks[layer] = len(own) * r
    wider = {layer: rank for layer, rank in ranks.items() if rank > r}
    patterns = {"rank_pattern": wider, "alpha_pattern": {layer: scaling * rank for layer, rank in wider.items()}}
    settings = {"r": r, "lora_alpha": scaling * r, "lora_dropout": lora["dropout"], "use_dora": dora, **patterns}
    config = peft.LoraConfig(**settings, target_modules=list(ranks), modules_to_save=heads, inference_mode=True)
    config.save_pretrained(str(out))
    named = {f"base_model.model.{name}": t.contiguous() for name, t in state.items()}
    save_file(named, out / "adapter_model.safetensors", {"format": "pt"})


def _parts(weight: str) -> list[str]:
    """timm's name of a linear layer's weight; of a fused q, k, v the names that they have where they are alone."""
    name = timm_name(weight)
    return [name.replace("qkv", part) for part in "qkv"] if ".qkv." in name else [name]


def load_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put PEFT's LoRA adapters, of HF's or timm's ViT, and their head on a plain model, in place; returns the model.

    One of a fused q, k, v becomes one of each. The files do not say which weights they are for: give those. Raises
    ConfigError where they hold anything else, or are for other layers; the model is left as it was.
    """
    sizes_of(model)
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        state = load_file(Path(folder, "adapter_model.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder} is no adapter of PEFT's: give what it saved ({one_line(error)})") from None
    slots: dict[str, Any] = {
        weight: (name, (target, block), place.sizes(model))
        for block, places in enumerate(places_of(model).values()) for place in places
        for weight, (target, name) in zip(_parts(place.weight), place.names.items(), strict=True)
    }  # fmt: skip
    alphas = {**config.get("alpha_pattern", {}), ".*": config["lora_alpha"]}
    tensors, pairs, found, scaling = {}, {}, set(), 0.0
    for key, A in state.items():
        layer, _, leaf = key.removeprefix("base_model.model.").partition(".lora_")
        parts, B = _parts(f"{layer}.weight"), state.get(key.replace(".lora_A.", ".lora_B."), A)
        if re.fullmatch(r"(classifier|head)\.(weight|bias)", layer):
            tensors[f"{head_name(model)}.{layer.partition('.')[2]}"] = A
        elif leaf == "A.weight":
            alpha = next(alphas[one] for one in alphas if re.fullmatch(rf"(.*\.)?({one})", layer))
            own = alpha / (len(A) ** 0.5 if config.get("use_rslora") else len(A))
            scaling = scaling or own
            for part, rows in zip(parts, B.chunk(len(parts)), strict=True):
                name, where, sizes = slots.get(part, ("", (), ()))
                if (len(rows), *A.shape[1:]) != sizes:
                    raise ConfigError(f"{folder} holds {layer}, which the {type(model).__name__} lacks in this size")
                if (used := rows.any(0) | ~B.any()).any():  # the columns of other parts may lie beside them
                    pairs[name] = A[used], rows[:, used] * (own / scaling)
                    found.add(where)
        elif leaf != "B.weight":
            raise ConfigError(f"{folder} holds {key}: adapters of linear layers and a head alone can be read")
    if not pairs:
        raise ConfigError(f"{folder} holds no adapter of a linear layer: give what PEFT saved of a LoRA model")
    rank = max(len(A) for A, _ in pairs.values())
    for name, (A, B) in pairs.items():
        more = rank - len(A)
        tensors |= {f"{name}.lora_A": F.pad(A, (0, 0, 0, more)), f"{name}.lora_B": F.pad(B, (0, more))}
    lora = {"method": "lora", "rank": rank, "alpha": scaling * rank, "scaling": "standard"}
    lora |= {"targets": sorted(dict(found)), "blocks": sorted({b for _, b in found}), "dropout": config["lora_dropout"]}
    put_on(model, Adapter(tensors, {"lora": lora, "effective_scaling": scaling}))
    return model


def _save(trained: TrainedModel, model: Any, out: Path) -> None:
    """Write a model of HF or timm as its library does, with class names and how images are prepared."""
    how, side = trained.preprocessing, trained.image_size
    cropped = how is not None and how.decoding.size is not None
    if hasattr(model, "pretrained_cfg"):
        from timm.models import save_for_hf

        shown: dict[str, Any] = {"input_size": (3, side, side)}
        if how is not None:
            shown |= {key: getattr(how, key) for key in ("mean", "std", "interpolation")}
            shown |= {"crop_pct": 1.0, "crop_mode": "center" if cropped else "squash"}
        described = {"pretrained_cfg": shown, "label_names": trained.class_names}
        return save_for_hf(model, str(out), described, safe_serialization=True)
    model.save_pretrained(out)
    if how is None:
        return
    from transformers import ViTImageProcessor

    square = {"height": side, "width": side}
    crop = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
    shown = {"image_mean": how.mean, "image_std": how.std, "resample": {"bilinear": 2, "bicubic": 3}[how.interpolation]}
    ViTImageProcessor(**(crop if cropped else {"size": square}), **shown, do_convert_rgb=True).save_pretrained(out)
