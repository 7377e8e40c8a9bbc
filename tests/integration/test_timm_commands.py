"""Trials on timm's backbones from configuration to merged file, by every command on the way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import train_together
from plain_models import timm_config, timm_trunk
from safetensors.torch import save_file

from lora_vit import evaluate, load_adapter, merge_adapter
from lora_vit.build import build_setup, prepare
from lora_vit.config import TrialConfig, trial_id
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError
from lora_vit.records import TrialRecord

timm = pytest.importorskip("timm")


def test_a_pack_on_timm_is_its_trials_alone(tmp_path):
    changes = [("lora.rank=2", "seed=0"), ("lora.rank=4", "seed=1", "lora.dropout=0.2")]
    configs = [timm_config("trainer.precision=fp64", "lora.blocks=[1]", *c, name="small_vit") for c in changes]
    together = train_together(configs, tmp_path / "pack")
    for config, one in zip(configs, together, strict=True):
        (alone,) = train_together([config], tmp_path / str(config.seed))
        assert alone.tensors.keys() == one.tensors.keys()
        torch.testing.assert_close(one.losses, alone.losses, rtol=1e-9, atol=1e-9)
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(one.tensors[name], tensor, rtol=1e-6, atol=1e-8)  # stored as fp32


def test_another_model_or_other_images_are_refused(tmp_path, call, monkeypatch):
    train_together([timm_config("lora=none", name="small_vit")], tmp_path)
    other = timm.create_model("small_dinov2", img_size=32, num_classes=0)
    with pytest.raises(ConfigError, match=r"architecture=small_vit, here architecture=small_dinov2"):
        load_adapter(other, tmp_path / "0")

    def with_another_mean(*given: object) -> tuple[Path, TrialRecord, TrialConfig]:
        folder, record, config = completed_trial(*given)
        config.model.mean = [0.1, 0.2, 0.3]
        return folder, record, config

    completed_trial = evaluate.completed_trial
    monkeypatch.setattr(evaluate, "completed_trial", with_another_mean)
    code, _, said = call("evaluate", tmp_path / "0")
    assert (code, "mean=[0.485, 0.456, 0.406], here mean=[0.1, 0.2, 0.3]" in said) == (1, True)


def test_the_same_weights_in_another_model_of_the_name_are_refused(tmp_path):
    train_together([timm_config("lora.blocks=[1]", name="small_vit")], tmp_path)

    def model(**changes: object) -> torch.nn.Module:
        made = timm.create_model("small_vit", img_size=32, num_classes=0, **changes)
        made.load_state_dict(timm_trunk("small_vit", 32).state_dict())
        return made

    same = model(drop_path_rate=0.1, dynamic_img_size=True).train()  # no matter in evaluation
    assert load_adapter(same, tmp_path / "0").training
    pooled = model()
    pooled.reset_classifier(0, "avg")
    for other in (model(num_heads=4), model(act_layer="quick_gelu"), pooled):
        for put in (load_adapter, merge_adapter):
            with pytest.raises(ConfigError, match="has the weights of small_vit, but computes something else with"):
                put(other, tmp_path / "0")
    del pooled.pretrained_cfg  # as of a model that timm's class was called for
    with pytest.raises(ConfigError, match="architecture=small_vit, here architecture=None"):
        load_adapter(pooled, tmp_path / "0")


def test_how_images_are_prepared_reaches_the_model():
    settings = ("model.mean=[0.2,0.3,0.4]", "model.std=[0.5,0.6,0.7]")
    own, other, both = (timm_config("lora=none", *settings[:n], name="small_vit") for n in range(3))
    assert len({trial_id(config) for config in (own, other, both)}) == 3
    pixels = torch.arange(3 * 16 * 16, dtype=torch.uint8).view(1, 3, 16, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.2, 0.3, 0.4], [0.5, 0.6, 0.7]))
    sized = torch.nn.functional.interpolate(pixels / 255, (32, 32), mode="bicubic", antialias=True)
    found = build_setup(both, Process()).transform.eval(pixels)
    torch.testing.assert_close(found, (sized - mean) / std, rtol=1e-4, atol=1e-4)  # torch resizes with rounded weights


def test_a_file_of_timms_names_is_loaded_and_another_refused(tmp_path):
    config = timm_config("lora=none", name="small_vit")
    config.model.weights = str(tmp_path / "w.safetensors")
    state = timm.create_model("small_vit", img_size=32).state_dict()
    save_file(state, config.model.weights)
    trunk = build_setup(config, Process()).build_model([config]).trunk
    assert all(torch.equal(t, state[n]) for n, t in trunk.state_dict().items())
    del state["blocks.1.mlp.fc1.weight"]
    save_file(state, config.model.weights)
    with pytest.raises(ConfigError, match=r"does not fit small_vit: it lacks blocks\.1\.mlp\.fc1\.weight"):
        build_setup(config, Process())


@pytest.mark.parametrize(
    ("more", "model", "said"),
    [
        ([], {"name": "vit_tinny_patch16_224"}, r"model.name=vit_tinny_.* timm .*did you mean 'vit_tiny_patch16_224'"),
        ([], {"name": "resnet18"}, r"model.name=resnet18 cannot be made .*DINOv2"),
        ([], {"name": "convnext_atto", "side": None}, r"model.name=convnext_atto: no target matches.*DINOv2"),
        ([], {"side": 40}, r"model.image_size=40: give a multiple of vit_tiny_patch16_224's patch size 16"),
        (["lora.rank=300"], {}, r"lora.rank=300 is impossible: blocks\.0\.attn\.qkv is 192 wide"),
        (["lora.blocks=[12]"], {}, r"lora.blocks=\[12\].*blocks 0 to 11"),
    ],
)
def test_what_the_model_cannot_do_ends_in_a_line_before_anything_is_built(more, model, said):
    config = timm_config(*more, **model)
    for check in (lambda: prepare([config]), lambda: build_setup(config, Process())):
        with pytest.raises(ConfigError, match=said) as caught:
            check()
        assert "\n" not in str(caught.value)


def test_what_is_wrong_without_asking_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # an import of it fails
    with pytest.raises(ConfigError, match=r"model\.num_layers=6 has no effect with model=timm"):
        timm_config("model.num_layers=6")


def test_without_timm_a_line_says_what_to_install(monkeypatch):
    config = timm_config()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"model=timm needs .*: pip install 'lora_vit\[timm\]'$"):
        prepare([config])


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch):
    def offline(*arguments: object, **_: object) -> None:
        raise OSError("no network\nat all")

    config = timm_config("model.weights=DEFAULT", name="vit_small_patch14_dinov2.lvd142m", side=28)
    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(ConfigError, match=r"model\.weights=DEFAULT.*no network at all.*fetch .*model\.safetensors"):
        prepare([config])


def test_the_models_own_size_is_taken():
    assert build_setup(timm_config("lora=none", side=None), Process()).transform.image_size == 224
