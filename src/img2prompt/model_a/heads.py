"""The heads: the paper's (eq. 1-3) and the linear baseline's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from img2prompt.model_a.ridge import Ridge


class Wide(nn.Module):
    """A branch with one hidden layer and batch norm, added to a linear layer (1st-place solution: 16,384 wide).

    Its output is zero before training, so that a head with it starts with the predictions of the head without it.
    """

    def __init__(self, features: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = (
            nn.Linear(features, hidden),
            nn.BatchNorm1d(hidden),
            nn.Linear(hidden, outputs),
        )
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(n, d) -> (n, t)."""
        self.norm.train(self.training and len(features) > 1)  # one row alone has no batch statistics
        return self.leave(functional.relu(self.norm(self.enter(features))))


class LinearHead(nn.Module):
    """The linear baseline, the paper's row "CLIP": one linear layer on standardised features.

    It starts as the ridge regression.

    Args:
        start: the ridge regression from pooled features to targets.
        dropout: probability that a standardised feature is dropped.
        hidden: width of the hidden layer of a `Wide` branch; 0: no branch.
        others: the regression without each part of the rows, standardised alike; none where no part is ever named.
    """

    def __init__(self, start: Ridge, dropout: float, hidden: int, others: Sequence[Ridge] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", start.mean.clone())
        self.register_buffer("std", start.std.clone())
        self.dropout = nn.Dropout(dropout)
        outputs, features = start.weight.shape
        self.fc = nn.Linear(features, outputs)
        self.fc.weight.data.copy_(start.weight)
        self.fc.bias.data.copy_(start.bias)
        self.wide = Wide(features, hidden, outputs) if hidden else None
        # Of use in training only, so in no file.
        self.register_buffer("start", start.weight.clone(), persistent=False)
        # The parts side by side: one product serves rows of all of them.
        weights = torch.cat([other.weight - start.weight for other in others], dim=1) if others else None
        biases = torch.stack([other.bias - start.bias for other in others]) if others else None
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("biases", biases, persistent=False)

    def forward(self, features: Tensor, parts: Tensor | None = None) -> Tensor:
        """V (n, d) -> (n, t), not normalised; with parts (n,) int64 a row starts from the regression without its part.

        What is learned, the difference from the start, is the same for all rows.
        """
        x = self.dropout((features - self.mean) / self.std)
        found = self.fc(x) if self.wide is None else self.fc(x) + self.wide(x)
        if parts is not None:
            of_part = functional.one_hot(parts, len(self.biases)).to(x.dtype)
            own = (of_part[:, :, None] * x[:, None]).flatten(1)
            found = found + functional.linear(own, self.weights) + self.biases[parts]
        return found

    def moved(self) -> Tensor:
        """The squared distance of the weights from the regression's."""
        return (self.fc.weight - self.start).square().sum()


class PaperHead(nn.Module):
    """Model A, eq. 1-3: N1 = LayerNorm1(FC1(V)), N2 = LayerNorm2(FC2(N1)), A = w*N1 + (1-w)*N2, w learned from 0.5.

    FC1 starts as the ridge regression and FC2 as the identity. A LayerNorm removes the mean over the t outputs,
    which is next to nothing beside their spread, and the scale, so N1, N2 and A start in the ridge
    regression's direction.

    Args: as LinearHead, which is FC1.
    """

    def __init__(self, start: Ridge, dropout: float, hidden: int, others: Sequence[Ridge] = ()) -> None:
        super().__init__()
        width = len(start.bias)
        self.fc1, self.norm1 = LinearHead(start, dropout, hidden, others), nn.LayerNorm(width, eps=1e-8)
        self.fc2, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-8)
        self.w = nn.Parameter(torch.tensor(0.5))
        nn.init.eye_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
        for norm in (self.norm1, self.norm2):
            nn.init.constant_(norm.weight, 1 / math.sqrt(width))  # outputs of norm about 1, like the targets

    def forward(self, features: Tensor, parts: Tensor | None = None) -> Tensor:
        """V (n, d) -> (n, t), not normalised; parts as in LinearHead."""
        n1 = self.norm1(self.fc1(features, parts))
        n2 = self.norm2(self.fc2(n1))
        return self.w * n1 + (1 - self.w) * n2

    def moved(self) -> Tensor:
        """As LinearHead's, of FC1."""
        return self.fc1.moved()


HEADS: dict[str, type[LinearHead] | type[PaperHead]] = {"linear": LinearHead, "model_a": PaperHead}
