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


def tile(device: str | torch.device, on_cpu: tuple[int, int]) -> tuple[int, int]:
    """How many rows are compared with how many at once: on the CPU as its caches like it, elsewhere to keep it busy."""
    return on_cpu if torch.device(device).type == "cpu" else (8192, 65_536)  # 2 GB of float32
