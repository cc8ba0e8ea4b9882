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
        self.dropout = dropout
        outputs, features = start.weight.shape
        self.fc = nn.Linear(features, outputs)
        self.fc.weight.data.copy_(start.weight)
        self.fc.bias.data.copy_(start.bias)
        self.wide = Wide(features, hidden, outputs) if hidden else None
        # Of use in training only, so in no file.
        self.register_buffer("start", start.weight.clone(), persistent=False)
        weights = torch.stack([other.weight - start.weight for other in others]) if others else None
        biases = torch.stack([other.bias - start.bias for other in others]) if others else None
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("biases", biases, persistent=False)

    def forward(self, features: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """V (n, d) -> (n, t), not normalised; with sizes a row starts from the regression without its part.

        Rows of a part follow one another, in the order of the parts: `sizes` says how many there are of each. What is
        learned, the difference from the start, is the same for all rows.
        """
        dropout = self.dropout if self.training else 0.0
        x = (features - self.mean).div_(self.std * (1 - dropout))
        if dropout:  # torch's own takes a CPU three times as long to draw
            x = x.mul_(torch.rand_like(x) >= dropout)
        found = self.fc(x) if self.wide is None else self.fc(x) + self.wide(x)
        if sizes is not None:
            parts = zip(x.split(sizes), self.weights, self.biases, strict=True)
            found = found + torch.cat([functional.linear(*of_part) for of_part in parts])
        return found

    @torch.no_grad()
    def pull(self, strength: float) -> None:
        """Add to the gradient that of half the squared distance of the weights from the regression's, times strength.

        By hand: autograd takes as long as for a whole layer.
        """
        self.fc.weight.grad.add_(self.fc.weight - self.start, alpha=strength)


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

    def forward(self, features: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """V (n, d) -> (n, t), not normalised; sizes as in LinearHead."""
        n1 = self.norm1(self.fc1(features, sizes))
        n2 = self.norm2(self.fc2(n1))
        return self.w * n1 + (1 - self.w) * n2

    def pull(self, strength: float) -> None:
        """As LinearHead's, of FC1."""
        self.fc1.pull(strength)


HEADS: dict[str, type[LinearHead] | type[PaperHead]] = {"linear": LinearHead, "model_a": PaperHead}
