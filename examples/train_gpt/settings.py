"""What a run is: everything that its losses depend on, apart from the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


class ExampleError(Exception):
    """The caller must change something; the message says what, in one line."""


@dataclass(frozen=True)
class Settings:
    """A run's settings, which a checkpoint holds and a resumed run takes from there."""

    implementation: str  # "tilewise", "sdpa" or "both"
    device: str
    dtype: str  # "fp32", or "bf16" for autocast
    steps: int
    batch: int
    context: int
    width: int
    layers: int
    heads: int
    lr: float
    dropout: float
    seed: int

    @property
    def variants(self) -> list[str]:
        """The models that are trained; with both, a control too: see `compare.py`."""
        return ["tilewise", "sdpa", "control"] if self.implementation == "both" else [self.implementation]


OPTIONS = {"context": "length"}  # where the option has another name than the setting

# About a minute of two cores.
CPU_DEFAULTS = {
    "dtype": "fp32",
    "steps": 400,
    "batch": 24,
    "context": 64,
    "width": 128,
    "layers": 2,
    "heads": 4,
    "lr": 3e-3,
    "dropout": 0.0,
}
GPU_DEFAULTS = {
    "dtype": "bf16",
    "steps": 1000,
    "batch": 64,
    "context": 256,
    "width": 384,
    "layers": 6,
    "heads": 6,
    "lr": 1e-3,
    "dropout": 0.2,
}


def choose_settings(given: dict[str, Any], saved: Settings | None) -> Settings:
    """All settings: those of the checkpoint, if there is one, else what was given and defaults for the rest.

    given: what the caller asked for, None where nothing; device may be "auto". Raises ExampleError where
    that differs from the checkpoint's, does not fit together, or asks for a GPU that is not there.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if asked.get("device") == "auto":
        del asked["device"]
    if saved is None:
        # True for NVIDIA and for AMD: torch built for ROCm answers under the same name.
        device = asked.get("device", "cuda" if torch.cuda.is_available() else "cpu")
        defaults = {"implementation": "both", "seed": 0, "device": device}
        defaults |= CPU_DEFAULTS if device == "cpu" else GPU_DEFAULTS
        settings = Settings(**(defaults | asked))
    else:
        settings = saved
        for name, value in asked.items():
            if value != getattr(saved, name):
                option = OPTIONS.get(name, name)
                raise ExampleError(
                    f"--{option} {value} does not fit the checkpoint, which has {option} "
                    f"{getattr(saved, name)}: leave --{option} out, or start over with --fresh"
                )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ExampleError("--device cuda: torch finds no GPU here")
    if settings.width % settings.heads:
        raise ExampleError(f"--width {settings.width} must be a multiple of --heads {settings.heads}")
    if settings.width // settings.heads > 512:
        raise ExampleError(f"--width {settings.width} / --heads {settings.heads} must be at most 512")
    return settings
