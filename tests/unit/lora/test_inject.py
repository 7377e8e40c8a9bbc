"""Adapters on a plain torchvision model: the public pair, every target, and the properties of an adapter."""

import copy
import inspect

import pytest
import torch
import yaml
from torch import nn
from torchvision.models import VisionTransformer, vit_b_16

from lora_vit import mark_lora_and_head_as_trainable, replace_linear_with_lora
from lora_vit.config import TARGETS
from lora_vit.lora.inject import remove_adapters
from lora_vit.lora.layers import LoRAAdapters


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    m = VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    nn.init.normal_(m.heads.head.weight)
    return m.double()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def adapters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for module in model.modules():
        if isinstance(module, LoRAAdapters):
            found |= {name: t.detach().clone() for name, t in module.trial_tensors(0).items()}
    return found


def train_steps(model: nn.Module, images: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()


def test_the_documented_snippet_runs_as_it_stands():
    model = vit_b_16(weights=None)
    model.heads.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(768, 200))
    replace_linear_with_lora(model)
    mark_lora_and_head_as_trainable(model, head_substring="heads.head", bias="none")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or n.startswith("heads.head") for n in trained)
    # r (in + out) for q, k, v, o and the two MLP layers of 12 blocks, and the head
    adapter = 12 * 4 * (4 * (768 + 768) + 2 * (768 + 3072))
    head = 768 * 200 + 200
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter + head


def test_library_defaults_equal_the_config(project_root):
    config = yaml.safe_load((project_root / "conf/lora/default.yaml").read_text())
    defaults = {n: p.default for n, p in inspect.signature(replace_linear_with_lora).parameters.items()}
    for key in ("rank", "alpha", "dropout", "blocks", "scaling", "init"):
        assert defaults[key] == config[key]
    assert list(defaults["targets"]) == config["targets"]


def test_identity_at_the_start_in_eval_and_train(model, images):
    expected = model(images)
    replace_linear_with_lora(model, dropout=0.5).double()
    # our attention sums in another order than nn.MultiheadAttention: rounding of fp64 only
    torch.testing.assert_close(model.eval()(images), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.train()(images), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("targets", [[t] for t in TARGETS] + [list(TARGETS)])
def test_every_adapter_learns(model, images, targets):
    replace_linear_with_lora(model, targets=targets).double()
    mark_lora_and_head_as_trainable(model)
    start = adapters_of(model)
    assert len(start) == 2 * 2 * len(targets)
    train_steps(model, images, 1)
    after_one = adapters_of(model)
    assert all(t.any() for n, t in after_one.items() if n.endswith("lora_B"))
    train_steps(model, images, 1)
    after_two = adapters_of(model)
    for name in (n for n in start if n.endswith("lora_A")):
        assert not torch.equal(after_two[name], start[name]), name


def test_removed_is_the_base_and_training_changed_the_output(model, images):
    base = model.eval()(images)
    replace_linear_with_lora(model).double()
    mark_lora_and_head_as_trainable(model)
    head = copy.deepcopy(model.heads)
    train_steps(model, images, 3)
    trained = model.eval()(images)
    assert not torch.allclose(trained, base, atol=1e-3)
    model.heads = head
    assert not torch.allclose(model(images), base, atol=1e-3)
    remove_adapters(model)
    torch.testing.assert_close(model(images), base, rtol=1e-12, atol=1e-12)
    assert not [n for n, _ in model.named_parameters() if "lora" in n]


def test_trained_adapters_are_not_replaced_unasked(model, images):
    again = copy.deepcopy(model)
    replace_linear_with_lora(model, rank=3, dropout=0.9, seed=5)
    mark_lora_and_head_as_trainable(model)
    train_steps(model, images, 2)
    trained = adapters_of(model)
    with pytest.raises(ValueError, match="the model has adapters already: take them out with"):
        replace_linear_with_lora(model, rank=2)
    assert all(torch.equal(t, trained[n]) for n, t in adapters_of(model).items())
    remove_adapters(model)
    model.heads.load_state_dict(again.heads.state_dict())
    for m in (model, again):
        replace_linear_with_lora(m, rank=2, targets=["v", "fc1"], dropout=0.3, seed=7).double()
        mark_lora_and_head_as_trainable(m)
        train_steps(m.train(), images, 2)
    first, second = adapters_of(model), adapters_of(again)
    assert first.keys() == second.keys()
    assert {n.split(".")[-2] for n in first} == {"v", "0"}
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    torch.testing.assert_close(model.eval()(images), again.eval()(images), rtol=0, atol=0)


SETTINGS = {
    "rank": {"rank": 2},
    "alpha": {"alpha": 8.0},
    "dropout": {"dropout": 0.5},
    "targets": {"targets": ["q", "v"]},
    "blocks": {"blocks": [1]},
    "scaling": {"scaling": "rslora"},
    "init": {"init": "gaussian"},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_the_outcome(model, images, name):
    def outcome(**settings) -> torch.Tensor:
        m = copy.deepcopy(model)
        replace_linear_with_lora(m, **settings).double()
        mark_lora_and_head_as_trainable(m)
        train_steps(m.train(), images, 3)
        return m.eval()(images)

    assert not torch.allclose(outcome(), outcome(**SETTINGS[name]), rtol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_dropout_reaches_every_target(model, images, target):
    replace_linear_with_lora(model, dropout=0.5, targets=[target]).double()
    mark_lora_and_head_as_trainable(model)
    train_steps(model.train(), images, 2)
    with torch.no_grad():
        first, second = model(images), model(images)
        assert not torch.equal(first, second)  # each pass of a model without a trainer is a new step
        model.eval()
        assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_bias_choices(model, images, bias):
    replace_linear_with_lora(model, targets=["fc1"]).double()
    trained = mark_lora_and_head_as_trainable(model, bias=bias)
    biases = [n for n in trained if n.endswith("bias") and "heads" not in n]
    every = [n for n, _ in model.named_parameters() if n.endswith("bias") and "heads" not in n]
    expected = {"none": [], "lora_only": [n for n in every if n.endswith("mlp.0.bias")], "all": every}[bias]
    assert biases == expected
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_steps(model, images, 1)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert set(biases) <= moved
    assert not [n for n in moved if n not in trained]


def test_state_dict_of_the_base_is_torchvisions(model):
    names = set(model.state_dict())
    replace_linear_with_lora(model)
    assert {n for n in model.state_dict() if "_lora." not in n} == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": []}, "no target matches"),
        ({"targets": ["qkv"]}, "q, k, v, o, fc1, fc2"),
        ({"targets": ["q", "w"]}, "q, k, v, o, fc1, fc2"),
        ({"blocks": [7]}, "blocks 0 to 1"),
        ({"blocks": [0, 7]}, "blocks 0 to 1"),
        ({"blocks": [-1]}, "blocks 0 to 1"),
        ({"blocks": []}, "blocks 0 to 1"),
        ({"rank": 0}, "rank=0 is impossible"),
        ({"rank": 2.5}, "rank=2.5 is impossible"),
        ({"rank": 17}, "16 wide"),
        ({"rank": 17, "targets": ["fc1"]}, "16 wide"),
        ({"rank": 1000, "targets": ["fc2"]}, "16 wide"),
        ({"alpha": 0.0}, "alpha=0.0 is impossible"),
        ({"alpha": float("nan")}, "alpha=nan is impossible"),
        ({"alpha": float("inf")}, "alpha=inf is impossible"),
        ({"dropout": 1.0}, "dropout=1.0 is impossible"),
        ({"dropout": -0.1}, "dropout=-0.1 is impossible"),
        ({"scaling": "half"}, "scaling 'half' is unknown"),
        ({"init": "zeros"}, "init 'zeros' is unknown"),
    ],
)
def test_impossible_settings_say_what_exists_and_change_nothing(model, settings, message):
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        replace_linear_with_lora(model, **settings)
    assert all(now is then for now, then in zip(model.modules(), before, strict=True))
    assert not model._forward_pre_hooks


def test_a_block_that_cannot_be_adapted_leaves_the_others_alone(model):
    model.encoder.layers[1].self_attention = nn.MultiheadAttention(16, 2, bias=False)
    before = list(model.modules())
    with pytest.raises(ValueError, match="only self-attention with one biased q, k, v projection"):
        replace_linear_with_lora(model)
    assert all(now is then for now, then in zip(model.modules(), before, strict=True))


def test_the_rank_may_fill_the_narrowest_layer(model):
    replace_linear_with_lora(model, rank=16)


def test_a_model_without_encoder_blocks_lists_its_linear_layers():
    with pytest.raises(ValueError, match=r"no target matches.*its linear layers: 0, 2"):
        replace_linear_with_lora(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


def test_mark_needs_adapters_and_a_head(model):
    with pytest.raises(ValueError, match="replace_linear_with_lora first"):
        mark_lora_and_head_as_trainable(model)
    replace_linear_with_lora(model)
    with pytest.raises(ValueError, match="head_substring='classifier'"):
        mark_lora_and_head_as_trainable(model, head_substring="classifier")
    with pytest.raises(ValueError, match="bias 'some' is unknown"):
        mark_lora_and_head_as_trainable(model, bias="some")
