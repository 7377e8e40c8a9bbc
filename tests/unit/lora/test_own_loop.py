"""Adapters in somebody's own loop: trained, saved, disabled, merged and taken out; what cannot be done is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import CLASSES, FAMILIES, RANK, D, assert_close, images_for, places, plain, small
from made_up_records import make_record
from torch import nn
from torchvision.models import VisionTransformer

from lora_vit import (
    adapter_state_dict,
    disable_adapter,
    load_adapter,
    mark_lora_and_head_as_trainable,
    merge_adapter,
    remove_adapter,
    replace_linear_with_lora,
    save_adapter,
)
from lora_vit.config import TARGETS
from lora_vit.errors import ConfigError
from lora_vit.lora.backbones import head_name
from lora_vit.records import write_record

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@pytest.mark.parametrize(
    ("targets", "bias", "settings"),
    [(list(TARGETS), "none", {"dropout": 0.2}), (["v", "fc1"], "all", {"method": "dora"})],
)
def test_what_is_trained_is_saved_disabled_merged_and_removed(family, targets, bias, settings, tmp_path):
    model = replace_linear_with_lora(plain(family), RANK, targets=targets, blocks=[1], **settings).double().train()
    mark_lora_and_head_as_trainable(model, head_name(model), bias)
    x, base = images_for(model), plain(family)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = model(x).square().mean()
        with disable_adapter(model), torch.no_grad():  # between a pass and its gradient, as a teacher
            model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained, plain_base = model.eval()(x).detach(), plain(family)
    head = {n: t for n, t in model.state_dict().items() if n.startswith("head")}
    assert plain_base.load_state_dict(head, strict=False).unexpected_keys == []
    expected = {f"{n}.lora_{m}" for _, n, _ in places(family, targets, [1]) for m in "AB"}
    if "method" in settings:
        expected |= {f"{n}.lora_magnitude" for _, n, _ in places(family, targets, [1])}
    expected |= {f"{head_name(model)}.{leaf}" for leaf in ("weight", "bias")}
    biases = {n for n, _ in base.named_parameters() if n.endswith("bias") and not n.startswith("head")}
    tensors = adapter_state_dict(model)
    assert set(tensors) == expected | (biases if bias == "all" else set())
    shape = base.get_parameter(places(family, targets)[0][0]).shape
    assert tensors[f"{places(family, targets, [1])[0][1]}.lora_A"].shape == (RANK, shape[1])
    if family == "DeiT distilled":  # its second head learns something else
        with pytest.raises(ConfigError, match="one head"):
            save_adapter(model, tmp_path)
        assert not list(tmp_path.iterdir())
    else:
        save_adapter(model, tmp_path / "new")
        assert_close(load_adapter(plain(family), tmp_path / "new").eval()(x), trained, 1e-5)  # adapters of fp32
        base.get_parameter(places(family, ["o"])[0][0]).data[0, 0] += 1e-3
        with pytest.raises(ConfigError, match="weights are not those"):
            load_adapter(base, tmp_path / "new")
    with disable_adapter(model):
        assert_close(model(x), plain_base(x), 1e-10)  # biases of q, k and v are added elsewhere
    assert torch.equal(model(x), trained)
    merged = merge_adapter(copy.deepcopy(model))
    assert_close(merged(x), trained, 1e-4)  # weights of fp32
    assert float((trained - plain_base(x)).detach().abs().max()) > 1e-2 * float(trained.abs().max())
    remove_adapter(model)
    with torch.no_grad():  # torch has other attention for a bias that is trained
        assert_close(model(x), plain_base(x), 1e-12)  # to the bit from torch 2.9 on
    for found in (merged, model):
        assert list(found.state_dict()) == list(plain_base.state_dict())
        assert [type(m) for m in found.modules()] == [type(m) for m in plain_base.modules()]
        assert not found._forward_pre_hooks
    assert all(torch.equal(t, plain_base.state_dict()[n]) for n, t in model.state_dict().items())


@every_family
@pytest.mark.parametrize("targets", [["q"], ["fc1"], ["o"], list(TARGETS)], ids=" ".join)
def test_what_is_trained(family, targets):
    model = replace_linear_with_lora(plain(family), targets=targets)
    names = [n for n, _ in model.named_parameters()]
    always = {n for n in names if ".lora_" in n or n.startswith("head")}
    every = {n for n in names if n.endswith("bias")} - always
    layers = {weight.removesuffix("weight") for weight, _, _ in places(family, targets)}
    adapted = {f"{layer}bias" for layer in layers}
    adapted |= {layer.replace("qkv.", f"{t}_bias") for layer in layers for t in "qv" if "qkv." in layer}
    for bias, biases in {"none": set(), "lora_only": adapted & every, "all": every}.items():
        trained = mark_lora_and_head_as_trainable(model, head_substring=head_name(model), bias=bias)
        assert trained == [n for n, p in model.named_parameters() if p.requires_grad]
        assert set(trained) == always | biases


def adapted(model: Any | None = None, **settings: Any) -> Any:
    """A model, torchvision's if none is given, with adapters that change its output, of which nothing is trained."""
    model = replace_linear_with_lora(plain("torchvision") if model is None else model, RANK, **settings).float()
    for name, p in model.requires_grad_(False).named_parameters():
        p.copy_(torch.ones_like(p)) if name.endswith("lora_B") else p
    return model.eval()


def test_a_model_without_a_head_is_saved_as_features(tmp_path):
    model, again = (small("torchvision", {}).float() for _ in range(2))
    model.heads, again.heads = nn.Sequential(), nn.Sequential()
    x = images_for(model).float()
    save_adapter(adapted(model), tmp_path)
    assert torch.equal(load_adapter(again, tmp_path)(x), model(x))
    assert model(x).shape == (4, D)


def disabled(model: Any) -> Any:
    vars(model)["block"] = block = disable_adapter(adapted(model))
    block.__enter__()
    return model


hidden = VisionTransformer(32, 16, 2, 3, D, 4 * D, representation_size=7)
OFF = "adapters are disabled: do this behind the block of disable_adapter"
REFUSED = {  # what is done to a plain model, what is then asked for, and the answer
    "no adapter": (lambda m: m, save_adapter, "the VisionTransformer has no adapter: give torchvision's or timm's"),
    "none to merge": (lambda m: m, lambda m, _: merge_adapter(m), "the VisionTransformer has no adapter"),
    "none to disable": (lambda m: m, lambda m, _: disable_adapter(m).__enter__(), "the VisionTransformer has no adap"),
    "wrapped": (lambda m: nn.DataParallel(adapted(m)), save_adapter, "the DataParallel has no adapter"),
    "adapted as a part": (lambda m: adapted(nn.Sequential(m)), save_adapter, "the Sequential has no adapter"),
    "all is trained": (lambda m: adapted(m).requires_grad_(), save_adapter, r"class_token is trained, .* choose .* by"),
    "a hidden layer": (lambda m: adapted(copy.deepcopy(hidden)), save_adapter, "heads are not one linear layer"),
    "a trial's folder": (adapted, save_adapter, "holds a trial: give another folder"),
    "class names": (adapted, lambda m, f: save_adapter(m, f, class_names=["a", "b"]),
                    f"the model's head has {CLASSES} classes, give each a name of its own"),
    "one name twice": (adapted, lambda m, f: save_adapter(m, f, class_names=["a"] * CLASSES), "a name of its own"),
    "in half": (lambda m: adapted(m).bfloat16(), lambda m, _: merge_adapter(m), "would round the update away"),
    "disabled, to save": (disabled, save_adapter, OFF),
    "disabled, to merge": (disabled, lambda m, _: merge_adapter(m), OFF),
    "disabled, to take out": (disabled, lambda m, _: remove_adapter(m), OFF),
    "disabled, to put on": (disabled, lambda m, _: replace_linear_with_lora(m), OFF),
    "disabled, to load": (disabled, lambda m, f: load_adapter(m, saved(f)), OFF),
}  # fmt: skip


def saved(folder: Any) -> Any:
    save_adapter(adapted(), folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused_in_a_line(what, tmp_path):
    change, function, message = REFUSED[what]
    if "trial" in what:
        write_record(tmp_path, make_record())
    model, files = change(plain("torchvision").float()), set(tmp_path.iterdir())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message) as error:
        function(model, tmp_path)
    assert "\n" not in str(error.value)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert set(tmp_path.iterdir()) - files <= {tmp_path / "saved"}


def test_disabling_twice_and_taking_out_of_a_plain_model_change_nothing():
    model, x = adapted(), images_for(plain("torchvision")).float()
    expected, base = model(x), remove_adapter(remove_adapter(copy.deepcopy(model)))(x)
    with disable_adapter(model):
        with disable_adapter(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), expected)
    assert not torch.equal(expected, base)


def test_the_same_weights_that_compute_something_else_are_not_its_base(tmp_path):
    """What timm's model is, only its arguments say, which no file has."""
    made = lambda heads: small("vit_tiny_patch16_224", {"num_heads": heads}).float()  # noqa: E731
    save_adapter(adapted(made(2)), tmp_path)
    load_adapter(made(2), tmp_path)
    with pytest.raises(ConfigError, match="computes something else"):
        load_adapter(made(4), tmp_path)
