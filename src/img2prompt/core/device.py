"""Where tensors live: CUDA where it is, the CPU elsewhere; IMG2PROMPT_DEVICE overrides."""

from __future__ import annotations

import os

import torch


def device() -> str:
    """The torch device to use; on CUDA, deterministic kernels are switched on."""
    name = os.environ.get("IMG2PROMPT_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    return name
