"""The torch device: CUDA where it is available, else the CPU; the variable IMG2PROMPT_DEVICE overrides the choice."""

from __future__ import annotations

import os

import torch


def device() -> str:
    """The torch device to use; on any but the CPU, deterministic kernels are switched on."""
    name = os.environ.get("IMG2PROMPT_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    return name
