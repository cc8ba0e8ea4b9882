"""Prediction with a tower's last layers and a head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from img2prompt.core.blocks import blocks
from img2prompt.core.device import autocast
from img2prompt.model_a.inputs import Inputs


@torch.no_grad()
def predict(
    tower: nn.Module, head: nn.Module, views: Sequence[Inputs], rows: np.ndarray, batch_size: int, device: str
) -> np.ndarray:
    """Predict `rows`: (m, t) float32 of norm 1, the mean of the views' predictions, each scaled to norm 1."""
    tower, head = tower.to(device).eval(), head.to(device).eval()
    batches = [rows[part] for part in blocks(len(rows), batch_size)]
    parts = []
    for inputs in zip(*(view.batches(batches, None) for view in views), strict=True):
        with autocast(device):
            found = [head(tower(x)).float() for x in inputs]
        found = [functional.normalize(of_view) for of_view in found]
        parts.append(functional.normalize(sum(found)) if len(found) > 1 else found[0])
    return torch.cat(parts).cpu().numpy() if parts else np.empty((0, 0), np.float32)
