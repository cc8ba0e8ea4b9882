"""Model A: heads on CLIP's image tower, trained with differential learning rates (arXiv 2401.06167, eq. 1-3)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from img2prompt.params import ModelA, Rates
from img2prompt.progress import progress
from img2prompt.storage import whole


class Standardise(nn.Module):
    """Features at mean 0 and deviation 1, by the training rows' statistics; a change of variables of the FC behind."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("std", features.std(0) + 1e-6)

    def forward(self, features: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        return (features - self.mean) / self.std


@dataclass(frozen=True)
class Ridge:
    """A closed-form ridge regression on standardised features: `features @ weight.T + bias`.

    `score` is the mean leave-one-out cosine over the rows it was fitted on, the best of the strengths tried.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    score: float


def ridge(features: Tensor, targets: Tensor) -> Ridge:
    """Fit every strength from one eigendecomposition and take the best by leave-one-out cosine, also closed-form.

    Only the rows given are looked at. The strengths go from hardly any to the mean target alone, in steps of
    about 1.8, so the best one is inside.

    Args:
        features: (n, d) of mean 0 and deviation 1.
        targets: (n, t) of norm 1.
    """
    x, mean = features.double(), targets.double().mean(0)
    y = targets.double() - mean
    # The smaller of the two Gram matrices; either gives the same fit.
    dual = len(x) <= x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if dual else x.T @ x)
    values = values.clamp(min=0)
    # Rows in the eigenbasis: the fit at strength s is basis @ diag(shrink(s)) @ basis.T @ y.
    basis = vectors if dual else (x @ vectors) / values.clamp(min=1e-9).sqrt()
    projected = basis.T @ y
    best = (-math.inf, 0.0)
    for strength in (len(x) * 10 ** torch.linspace(-3, 4, 29)).tolist():
        shrink = values / (values + strength)
        leverage = (basis.square() @ shrink + 1 / len(x))[:, None]
        # What the other rows say of a row: take its own pull out of its fit (and out of the mean).
        left_out = (basis @ (shrink[:, None] * projected) + mean - leverage * targets.double()) / (1 - leverage)
        score = functional.cosine_similarity(left_out, targets.double()).mean().item()
        best = max(best, (score, strength))
    score, strength = best
    inner = vectors / (values + strength) @ vectors.T
    weight = (x.T @ (inner @ y) if dual else inner @ (x.T @ y)).T
    return Ridge(weight.float(), mean.float(), strength, score)


class LinearHead(nn.Module):
    """The paper's row "CLIP": one linear layer. Starts as the ridge regression.

    Args:
        standardise: of the pooled features.
        start: (t, d) weight and (t,) bias on standardised features.
        dropout: on the features.
    """

    def __init__(self, standardise: Standardise, start: Ridge, dropout: float) -> None:
        super().__init__()
        self.standardise, self.dropout = standardise, nn.Dropout(dropout)
        self.fc = nn.Linear(*reversed(start.weight.shape))
        self.fc.weight.data.copy_(start.weight)
        self.fc.bias.data.copy_(start.bias)

    def forward(self, features: Tensor) -> Tensor:
        """V (n, d) -> (n, t), not normalised."""
        return self.fc(self.dropout(self.standardise(features)))


class PaperHead(nn.Module):
    """Model A, eq. 1-3: N1 = LayerNorm1(FC1(V)), N2 = LayerNorm2(FC2(N1)), A = w*N1 + (1-w)*N2, w learned from 0.5.

    FC1 starts as the ridge regression and FC2 as the identity. A norm takes out the mean over the t outputs, which
    is next to nothing beside their spread, and the scale, so N1, N2 and A start in the ridge regression's direction.

    Args:
        standardise: of the pooled features.
        start: (t, d) weight and (t,) bias on standardised features.
        dropout: on the features.
    """

    def __init__(self, standardise: Standardise, start: Ridge, dropout: float) -> None:
        super().__init__()
        width = len(start.bias)
        self.standardise, self.dropout = standardise, nn.Dropout(dropout)
        self.fc1, self.norm1 = nn.Linear(*reversed(start.weight.shape)), nn.LayerNorm(width, eps=1e-8)
        self.fc2, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-8)
        self.w = nn.Parameter(torch.tensor(0.5))
        self.fc1.weight.data.copy_(start.weight)
        self.fc1.bias.data.copy_(start.bias)
        nn.init.eye_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
        for norm in (self.norm1, self.norm2):
            nn.init.constant_(norm.weight, 1 / math.sqrt(width))  # outputs of norm about 1, like the targets

    def forward(self, features: Tensor) -> Tensor:
        """V (n, d) -> (n, t), not normalised."""
        n1 = self.norm1(self.fc1(self.dropout(self.standardise(features))))
        n2 = self.norm2(self.fc2(n1))
        return self.w * n1 + (1 - self.w) * n2


HEADS: dict[str, type[LinearHead] | type[PaperHead]] = {"clip": LinearHead, "model_a": PaperHead}


class Inputs(Protocol):
    """What feeds the layers that train."""

    def batches(self, rows: list[np.ndarray], epoch: int | None) -> Iterator[Tensor]:
        """Yield one input a batch of row numbers; `epoch` seeds the augmentation, None is without."""


class Stored:
    """Inputs computed once: an array, in memory or mapped, with one entry a row."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def batches(self, rows: list[np.ndarray], epoch: int | None) -> Iterator[Tensor]:
        """Yield (b, ...) float32."""
        for batch in rows:
            yield torch.from_numpy(self._array[batch]).float()


@dataclass(frozen=True)
class Schedule:
    """One phase of training.

    `lr_tower` and `lr_head` are the peaks of a cosine schedule with a linear warm-up over the share `warmup`
    of the steps; a step sees `batch_size * accumulate` rows.
    """

    epochs: int
    lr_tower: float
    lr_head: float
    batch_size: int
    accumulate: int
    weight_decay: float
    warmup: float
    clip_grad: float
    seed: tuple[int, ...]

    def factor(self, step: int, steps: int) -> float:
        """Share of the peak rate at `step` of 0 .. steps-1."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def parameter_groups(tower: nn.Module, head: nn.Module, schedule: Schedule) -> list[dict[str, object]]:
    """Optimiser groups with differential rates: every trainable parameter in exactly one.

    Biases, norms and the mix are not decayed: pulling them to zero would pull predictions off the mean target.
    """
    groups = []
    for module, rate in ((tower, schedule.lr_tower), (head, schedule.lr_head)):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for decay, members in (
            (schedule.weight_decay, [p for p in trained if p.ndim > 1]),
            (0.0, [p for p in trained if p.ndim <= 1]),
        ):
            if members:
                groups.append({"params": members, "lr": rate, "peak": rate, "weight_decay": decay})
    return groups


def cosine_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Sum over rows of 1 - cosine (eq. 7); (n, t) each, of any norm."""
    return (1 - functional.cosine_similarity(predicted.float(), target.float())).sum()


def fit(
    tower: nn.Module,
    head: nn.Module,
    inputs: Inputs,
    targets: np.ndarray,
    rows: np.ndarray,
    schedule: Schedule,
    device: str,
    resume: Path,
    watched: np.ndarray,
    what: str,
) -> list[dict[str, float]]:
    """Train head, and tower where it is not frozen, by the cosine to the targets; changed in place.

    After each epoch everything that the next one needs is written to `resume`; if the file is there, training
    goes on from it and ends with the same weights. Norms' running statistics stay as they came.

    Args:
        tower: maps an input to (b, d); parameters that do not require gradients stay as they are.
        head: maps (b, d) to (b, t).
        inputs: of the tower, by row.
        targets: (copies, n, t) float32; each epoch draws one of the copies for every row.
        rows: (m,) the rows that train.
        schedule: rates, batches and epochs.
        device: a torch device.
        resume: file of the last finished epoch.
        watched: (w,) rows whose mean cosine is logged after each epoch; they decide nothing.
        what: named by the progress bar.

    Returns:
        One dict an epoch: `epoch` from 1, `loss` (mean 1 - cosine over the training rows), `score` (on `watched`).
    """
    tower, head = tower.to(device), head.to(device)
    optimiser = torch.optim.AdamW(parameter_groups(tower, head, schedule))
    # bf16 needs no loss scaling; cards before Ampere have only fp16. CPUs train small towers faster in fp32.
    cuda = torch.device(device).type == "cuda"
    half = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    scaler = torch.amp.GradScaler("cuda", enabled=cuda and half == torch.float16)
    model = nn.ModuleDict({"tower": tower, "head": head})
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]

    history = _load(resume, model, optimiser, scaler) if resume.is_file() else []
    per_step = schedule.batch_size * schedule.accumulate
    steps_per_epoch = math.ceil(len(rows) / per_step)
    epochs = progress(range(len(history), schedule.epochs), what, unit="epoch")
    for epoch in epochs:
        rng = np.random.default_rng([*schedule.seed, epoch])
        torch.manual_seed(int(rng.integers(2**63)))  # dropout
        order = rng.permutation(rows)
        copy = rng.integers(len(targets), size=len(order))
        micro = [
            (step, order[start : start + schedule.batch_size], copy[start : start + schedule.batch_size])
            for step in range(steps_per_epoch)
            for start in range(step * per_step, min((step + 1) * per_step, len(order)), schedule.batch_size)
        ]
        last = {step: number for number, (step, _, _) in enumerate(micro)}
        total = 0.0
        tower.eval()
        head.train()
        batches = inputs.batches([batch for _, batch, _ in micro], epoch)
        for number, ((step, batch, copies), x) in enumerate(zip(micro, batches, strict=True)):
            with torch.autocast("cuda", half, enabled=cuda):
                predicted = head(tower(x.to(device)))
            loss = cosine_loss(predicted, torch.from_numpy(targets[copies, batch]).to(device))
            total += loss.item()
            # The last step of an epoch may be smaller: every row weighs the same within its step.
            scaler.scale(loss / min(per_step, len(order) - step * per_step)).backward()
            if number < last[step]:
                continue
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * schedule.factor(
                    epoch * steps_per_epoch + step, schedule.epochs * steps_per_epoch
                )
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(trained, schedule.clip_grad)
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()
        seen = predict(tower, head, inputs, watched, schedule.batch_size, device)
        score = float((seen * targets[0, watched]).sum(1).mean()) if len(watched) else 0.0
        history.append({"epoch": epoch + 1, "loss": total / len(order), "score": score})
        epochs.set_postfix(score=f"{score:.4f}", refresh=False)
        _save(resume, model, optimiser, scaler, history)
    return history


def start_head(kind: str, pooled: np.ndarray, targets: np.ndarray, dropout: float) -> nn.Module:
    """A head as it starts: the ridge regression from pooled (n, d) to targets (n, t), both of the training rows."""
    features = torch.from_numpy(pooled)
    standardise = Standardise(features)
    return HEADS[kind](standardise, ridge(standardise(features), torch.from_numpy(targets)), dropout)


def train(
    kind: str,
    pooled: np.ndarray,
    inputs: Inputs,
    tower: nn.Module,
    targets: np.ndarray,
    rows: np.ndarray,
    watched: np.ndarray,
    settings: ModelA,
    rates: Rates,
    seed: Sequence[int],
    device: str,
    resume: Path,
) -> tuple[nn.Module, pd.DataFrame]:
    """Train one model in two phases: the head alone on the pooled features, then tower and head together.

    Args:
        kind: a key of HEADS.
        pooled: (n, d) float32, V(x) of the untouched tower.
        inputs: of `tower`.
        tower: the layers that train, changed in place; without any, the second phase trains the head on.
        targets, rows, watched: as in `fit`.
        settings: what both heads share.
        rates: this head's epochs and learning rates.
        seed: of initial weights, order and dropout.
        device: a torch device.
        resume: folder of what a killed run goes on from.

    Returns:
        The trained head, and the history: `phase`, `epoch`, `loss`, `score`.
    """
    torch.manual_seed(int(np.random.SeedSequence([*seed, 0]).generate_state(1)[0]))
    head = start_head(kind, pooled[rows], targets[0, rows], settings.dropout)
    history = []
    for phase, layers, source, epochs in (
        ("head", nn.Identity(), Stored(pooled), rates.head_epochs),
        ("tower", tower, inputs, rates.tower_epochs),
    ):
        schedule = Schedule(
            epochs=epochs,
            lr_tower=rates.lr_tower,
            lr_head=rates.lr_head,
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            weight_decay=settings.weight_decay,
            warmup=settings.warmup,
            clip_grad=settings.clip_grad,
            seed=(*seed, 1 + (phase == "tower")),
        )
        file = resume / f"{kind}-{phase}.safetensors"
        log = fit(layers, head, source, targets, rows, schedule, device, file, watched, f"{kind}, {phase}")
        history += [{"phase": phase, **entry} for entry in log]
    return head, pd.DataFrame(history)


@torch.no_grad()
def predict(
    tower: nn.Module, head: nn.Module, inputs: Inputs, rows: np.ndarray, batch_size: int, device: str
) -> np.ndarray:
    """Predict `rows`: (m, t) float32, rows of norm 1."""
    tower.eval()
    head.eval()
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    parts = [
        functional.normalize(head(tower(x.to(device))).float()).cpu().numpy() for x in inputs.batches(batches, None)
    ]
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


def _save(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler, history: list
) -> None:
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value.contiguous() for name, value in state.items()}
    with whole(path) as aside:
        save_file(tensors, aside, {"history": json.dumps(history), "scaler": json.dumps(scaler.state_dict())})


def _load(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> list:
    weights: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            kind, _, rest = name.partition(".")
            if kind == "model":
                weights[rest] = file.get_tensor(name)
            else:
                index, _, key = rest.partition(".")
                state.setdefault(int(index), {})[key] = file.get_tensor(name)
        metadata = file.metadata()
    model.load_state_dict(weights)
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    scaler.load_state_dict(json.loads(metadata["scaler"]))
    return json.loads(metadata["history"])
