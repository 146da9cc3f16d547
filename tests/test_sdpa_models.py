"""tilewise.sdpa behind models of timm and diffusers: as exact as without it, and every attention answered."""

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import tilewise
from harness.switched import KERNELS, assert_model_matches, fresh_switch, who

__all__ = ["fresh_switch"]


class NoTorchvision(MetaPathFinder, Loader):
    """Stands in for torchvision while timm is imported, which wants it for images from files. Its wheels go
    with the CUDA build of PyTorch alone, and beside another they keep Transformers from being imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module: Any) -> None:
        pass


def timm_and_diffusers():
    if importlib.util.find_spec("torchvision") is None:
        stand_in = NoTorchvision()
        sys.meta_path.append(stand_in)
        importlib.import_module("timm")
        sys.meta_path.remove(stand_in)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    return importlib.import_module("timm"), importlib.import_module("diffusers")


timm, diffusers = timm_and_diffusers()


def vit():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    )
    return model, lambda model, dtype: model(images(3, 32).to(dtype)), 2


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, patch_size=2,
        norm_num_groups=4, num_embeds_ada_norm=10, dropout=0.0,
    )  # fmt: skip

    def run(model, dtype):
        return model(images(4, 8).to(dtype), timestep=STEPS, class_labels=STEPS).sample

    return model.eval(), run, 2


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=24, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    words = torch.randn(2, 7, 24)
    seen = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])

    def run(model, dtype):
        given = dict(encoder_hidden_states=words.to(dtype), encoder_attention_mask=seen)
        return model(images(4, 8).to(dtype), STEPS, **given).sample

    return model, run, 8


STEPS = torch.tensor([3, 4])


def images(channels: int, size: int) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("make", [vit, dit, unet])
def test_a_model(make):
    model, run, calls = make()

    def switched(model):
        with tilewise.sdpa():
            return run(model, torch.float32)

    assert_model_matches(model, run, switched)
    assert who() == [KERNELS] * calls
