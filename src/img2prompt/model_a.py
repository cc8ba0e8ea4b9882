"""Model A: heads on CLIP's image tower, trained with differential learning rates (arXiv 2401.06167, eq. 1-3)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from img2prompt.params import ModelA, Rates
from img2prompt.progress import progress
from img2prompt.storage import whole


@dataclass(frozen=True)
class Ridge:
    """A closed-form ridge regression: `(features - mean) / std @ weight.T + bias`.

    `score` is the mean cosine over the rows it was fitted on, each predicted without its group: the best of the
    strengths tried, and of the shares of the text prior.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    strength: float
    share: float
    score: float


@dataclass(frozen=True)
class TextPrior:
    """What CLIP's texts say of the targets, as a prior for a ridge regression on pictures.

    `texts` (m, k) are CLIP text embeddings and `targets` (m, t) theirs; the first n are those of the n rows that the
    regression is fitted on, others need no picture. `projection` (d, k) is CLIP's, from features to the space of texts.
    """

    texts: Tensor
    targets: Tensor
    projection: Tensor


class _Spectrum:
    """The eigendecomposition from which the fits of every strength on rows x (n, d) of mean 0 follow."""

    def __init__(self, x: Tensor, groups: np.ndarray) -> None:
        # The smaller of the two Gram matrices; either gives the same fit.
        self.x, self.dual = x, len(x) <= x.shape[1]
        values, self.vectors = torch.linalg.eigh(x @ x.T if self.dual else x.T @ x)
        self.values = values.clamp(min=0)
        # Rows in the eigenbasis: the fit at strength s is basis @ diag(shrink(s)) @ basis.T @ outputs.
        self.basis = self.vectors if self.dual else (x @ self.vectors) / self.values.clamp(min=1e-9).sqrt()
        if len(np.unique(groups)) == 1:  # without its group nothing would be left to predict a row from
            groups = np.arange(len(groups))
        members = pd.Series(np.arange(len(groups))).groupby(groups).agg(list)
        self.groups = [
            torch.tensor(np.stack(alike.to_list())) for _, alike in members.groupby(members.map(len))
        ]  # of every size g, the rows of the m groups of that size: (m, g)

    def left_out(self, outputs: Tensor, strengths: Sequence[float]) -> Iterator[Tensor]:
        """For each strength, outputs (n, o) of mean 0 less what is predicted of a row without its group's rows."""
        projected = self.basis.T @ outputs
        for strength in strengths:
            shrink = self.values / (self.values + strength)
            residual = outputs - self.basis @ (shrink[:, None] * projected)
            rooted = self.basis * shrink.sqrt()
            for rows in self.groups:
                block = rooted[rows]
                hat = block @ block.mT + 1 / len(self.x)  # the last part is the mean's
                residual[rows] = torch.linalg.solve(torch.eye(rows.shape[1], dtype=hat.dtype) - hat, residual[rows])
            yield residual

    def weight(self, outputs: Tensor, strength: float) -> Tensor:
        """The fit's weight (o, d)."""
        inner = self.vectors / (self.values + strength) @ self.vectors.T
        return (self.x.T @ (inner @ outputs) if self.dual else inner @ (self.x.T @ outputs)).T


def ridge(features: Tensor, targets: Tensor, groups: np.ndarray | None = None, prior: TextPrior | None = None) -> Ridge:
    """Fit every strength from one eigendecomposition, take the best by leaving groups out, also in closed form.

    Features are brought to mean 0 and deviation 1 first: strengths weigh them alike. The strengths go from hardly
    any to the mean target alone, in steps of about 1.8, so the best one is inside.

    With a prior, weights shrink towards a share of what another ridge regression, from CLIP's texts to the targets,
    says of projected pictures, in place of towards zero. The share is chosen with the strength, and a group's texts
    are left out with its pictures; a share of 0 is the regression without prior.

    Args:
        features: (n, d) float32.
        targets: (n, t) of norm 1.
        groups: (n,) rows of one group are predicted without each other; None: each row is a group.
        prior: see TextPrior.
    """
    groups = np.arange(len(features)) if groups is None else groups
    centre, std = features.mean(0), features.std(0) + 1e-6
    x, t = ((features - centre) / std).double(), targets.double()
    mean = t.mean(0)
    outputs, spectrum = t - mean, _Spectrum(x, groups)
    shares = torch.linspace(0, 1.5, 31, dtype=torch.double) if prior else torch.zeros(1, dtype=torch.double)
    if prior:
        others = groups.max() + 1 + np.arange(len(prior.texts) - len(x))
        text_groups = np.concatenate([groups, others])
        text = ridge(prior.texts, prior.targets, text_groups)
        c = ((prior.texts - text.mean) / text.std).double()
        spoken = prior.targets.double() - text.bias.double()
        (wrong,) = _Spectrum(c, text_groups).left_out(spoken, [text.strength])
        inverse = torch.linalg.inv(c.T @ c + text.strength * torch.eye(c.shape[1], dtype=torch.double))
        translate = text.weight.double().T  # (k, t)
        project = std.double()[:, None] * prior.projection.double() / text.std.double()
        project /= (x @ project).square().mean().sqrt()  # as wide as texts are: a share of 1 takes them at their word
        outputs = torch.cat([outputs, x @ project], dim=1)

    best = (-math.inf, 0.0, 0.0)
    strengths = (len(x) * 10 ** torch.linspace(-3, 4, 29)).tolist()
    for strength, left_out in zip(strengths, spectrum.left_out(outputs, strengths), strict=True):
        predicted = t - left_out[:, : t.shape[1]]
        scores = functional.cosine_similarity(predicted, t).mean()[None]
        if prior:
            # The regression takes back what it finds of the prior in the other rows; this much of a row is left.
            q = left_out[:, t.shape[1] :]
            added = q @ translate
            for rows in spectrum.groups:
                added[rows] -= q[rows] @ inverse @ c[rows].mT @ wrong[rows]
            aa, ab, bb = (predicted * predicted).sum(1), (predicted * added).sum(1), (added * added).sum(1)
            norms = (aa[:, None] + 2 * shares * ab[:, None] + shares**2 * bb[:, None]).sqrt()
            dots = (predicted * t).sum(1)[:, None] + shares * (added * t).sum(1)[:, None]
            scores = (dots / norms).mean(0)
        place = int(scores.argmax())
        best = max(best, (scores[place].item(), strength, shares[place].item()))
    score, strength, share = best
    start = share * project @ translate if prior else torch.zeros(x.shape[1], t.shape[1], dtype=torch.double)
    weight = start.T + spectrum.weight(t - mean - x @ start, strength)
    return Ridge(centre, std, weight.float(), mean.float(), strength, share, score)


class Wide(nn.Module):
    """A hidden layer beside the output (the competition's 1st place: 16,384 wide, with batch norm).

    Its own output starts at zero, so that a head with it starts where the head without it does.
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
        self.norm.train(self.training and len(features) > 1)  # one row alone has no spread
        return self.leave(functional.relu(self.norm(self.enter(features))))


class LinearHead(nn.Module):
    """The paper's row "CLIP": one linear layer on standardised features. Starts as the ridge regression.

    Args:
        start: the ridge regression from pooled features to targets.
        dropout: on the features.
        hidden: width of a hidden layer beside it; 0: none.
    """

    def __init__(self, start: Ridge, dropout: float, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", start.mean.clone())
        self.register_buffer("std", start.std.clone())
        self.dropout = nn.Dropout(dropout)
        outputs, features = start.weight.shape
        self.fc = nn.Linear(features, outputs)
        self.fc.weight.data.copy_(start.weight)
        self.fc.bias.data.copy_(start.bias)
        self.wide = Wide(features, hidden, outputs) if hidden else None

    def forward(self, features: Tensor) -> Tensor:
        """V (n, d) -> (n, t), not normalised."""
        x = self.dropout((features - self.mean) / self.std)
        return self.fc(x) if self.wide is None else self.fc(x) + self.wide(x)


class PaperHead(nn.Module):
    """Model A, eq. 1-3: N1 = LayerNorm1(FC1(V)), N2 = LayerNorm2(FC2(N1)), A = w*N1 + (1-w)*N2, w learned from 0.5.

    FC1 starts as the ridge regression and FC2 as the identity. A norm takes out the mean over the t outputs, which
    is next to nothing beside their spread, and the scale, so N1, N2 and A start in the ridge regression's direction.

    Args: as LinearHead, which is FC1.
    """

    def __init__(self, start: Ridge, dropout: float, hidden: int) -> None:
        super().__init__()
        width = len(start.bias)
        self.fc1, self.norm1 = LinearHead(start, dropout, hidden), nn.LayerNorm(width, eps=1e-8)
        self.fc2, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-8)
        self.w = nn.Parameter(torch.tensor(0.5))
        nn.init.eye_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
        for norm in (self.norm1, self.norm2):
            nn.init.constant_(norm.weight, 1 / math.sqrt(width))  # outputs of norm about 1, like the targets

    def forward(self, features: Tensor) -> Tensor:
        """V (n, d) -> (n, t), not normalised."""
        n1 = self.norm1(self.fc1(features))
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


class AnyPicture:
    """Inputs in which an epoch takes any of the pictures of a row's prompt; without an epoch the row's own.

    Args:
        inputs: by row.
        prompts: (n,) int64, equal for rows of one prompt; below 0 for rows that must not be drawn.
        seed: with the epoch, of the draw.
    """

    def __init__(self, inputs: Inputs, prompts: np.ndarray, seed: Sequence[int]) -> None:
        self._inputs, self._prompts, self._seed = inputs, prompts, seed
        drawable = np.flatnonzero(prompts >= 0)
        self._rows = drawable[np.argsort(prompts[drawable], kind="stable")]
        self._counts = np.bincount(prompts[drawable])
        self._starts = np.cumsum(self._counts) - self._counts

    def batches(self, rows: list[np.ndarray], epoch: int | None) -> Iterator[Tensor]:
        """Yield what `inputs` does, of the pictures drawn."""
        if epoch is not None:
            rng = np.random.default_rng([*self._seed, epoch])
            rows = [self._draw(batch, rng) for batch in rows]
        yield from self._inputs.batches(rows, epoch)

    def _draw(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        prompts = self._prompts[rows]
        return self._rows[self._starts[prompts] + rng.integers(self._counts[prompts])]


@dataclass(frozen=True)
class Schedule:
    """One phase of training.

    `lr_tower` and `lr_head` are the peaks of a cosine schedule with a linear warm-up over the share `warmup`
    of the steps; a step sees `batch_size * accumulate` rows. Each layer of the tower has the rate of the one behind
    it times `layer_decay`. `mse` is the weight of the mean squared error beside the cosine. With `ema`, weights are
    averaged over about this share of the steps, the latest counting most.
    """

    epochs: int
    lr_tower: float
    lr_head: float
    layer_decay: float
    mse: float
    ema: float
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


def parameter_groups(tower: nn.Sequential, head: nn.Module, schedule: Schedule) -> list[dict[str, object]]:
    """Optimiser groups with differential rates: every trainable parameter in exactly one.

    The last layer of the tower has `lr_tower`. Biases, norms and the mix are not decayed:
    pulling them to zero would pull predictions off the mean target.
    """
    rates = [schedule.lr_tower * schedule.layer_decay**behind for behind in reversed(range(len(tower)))]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module, rate in zip([*tower, head], [*rates, schedule.lr_head], strict=True):
        for parameter in module.parameters():
            if parameter.requires_grad:
                groups.setdefault((rate, schedule.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [
        {"params": members, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]


def cosine_loss(predicted: Tensor, target: Tensor, mse: float = 0.0) -> Tensor:
    """Sum over rows of 1 - cosine (eq. 7) + mse * mean squared error; (n, t) each, of any norm."""
    predicted, target = predicted.float(), target.float()
    loss = (1 - functional.cosine_similarity(predicted, target)).sum()
    return loss + mse * functional.mse_loss(predicted, target, reduction="none").mean(1).sum() if mse else loss


def fit(
    tower: nn.Sequential,
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
    goes on from it and ends with the same weights. The tower's norms keep their running statistics.

    Args:
        tower: layers in order that map an input to (b, d); parameters without gradients stay as they are.
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
        One dict an epoch: `epoch` from 1, `loss` (mean over the training rows), `score` (mean cosine on `watched`).
    """
    tower, head = tower.to(device), head.to(device)
    optimiser = torch.optim.AdamW(parameter_groups(tower, head, schedule))
    # bf16 needs no loss scaling; cards before Ampere have only fp16. CPUs train small towers faster in fp32.
    cuda = torch.device(device).type == "cuda"
    half = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    scaler = torch.amp.GradScaler("cuda", enabled=cuda and half == torch.float16)
    model = nn.ModuleDict({"tower": tower, "head": head})
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]

    per_step = schedule.batch_size * schedule.accumulate
    steps_per_epoch = math.ceil(len(rows) / per_step)
    steps = schedule.epochs * steps_per_epoch
    average = ModelEmaV3(model, 1 - 1 / max(1.0, schedule.ema * steps)) if schedule.ema and steps else None
    used = average.module if average else model
    history = _load(resume, model, average, optimiser, scaler) if resume.is_file() else []
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
            loss = cosine_loss(predicted, torch.from_numpy(targets[copies, batch]).to(device), schedule.mse)
            total += loss.item()
            # The last step of an epoch may be smaller: every row weighs the same within its step.
            scaler.scale(loss / min(per_step, len(order) - step * per_step)).backward()
            if number < last[step]:
                continue
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * schedule.factor(epoch * steps_per_epoch + step, steps)
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(trained, schedule.clip_grad)
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()
            if average:
                average.update(model)
        seen = predict(used["tower"], used["head"], [inputs], watched, schedule.batch_size, device)
        score = float((seen * targets[0, watched]).sum(1).mean()) if len(watched) else 0.0
        history.append({"epoch": epoch + 1, "loss": total / len(order), "score": score})
        epochs.set_postfix(score=f"{score:.4f}", refresh=False)
        _save(resume, model, average, optimiser, scaler, history)
    if average:
        model.load_state_dict(average.module.state_dict())
    return history


def interpolate(model: nn.Module, original: Mapping[str, Tensor], share: float) -> None:
    """WiSE-FT (arXiv 2109.01903): every weight goes to `share` of the way from `original` to where it is, in place."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(original[name].to(value.device), 1 - share)


def train(
    kind: str,
    start: Ridge,
    pooled: np.ndarray,
    inputs: Inputs,
    tower: nn.Sequential,
    targets: np.ndarray,
    rows: np.ndarray,
    watched: np.ndarray,
    settings: ModelA,
    rates: Rates,
    seed: Sequence[int],
    device: str,
    resume: Path,
    prompts: np.ndarray | None = None,
) -> tuple[nn.Module, pd.DataFrame]:
    """Train one model in two phases: the head alone on the pooled features, then tower and head together (LP-FT).

    Args:
        kind: a key of HEADS.
        start: the ridge regression that the head starts as, of the training rows.
        pooled: (n, d) float32, V(x) of the untouched tower.
        inputs: of `tower`.
        tower: the layers that train, changed in place; without any, the second phase trains the head on.
        targets, rows, watched: as in `fit`.
        settings: what both heads share.
        rates: this head's epochs and learning rates.
        seed: of initial weights, order and dropout.
        device: a torch device.
        resume: folder of what a killed run goes on from.
        prompts: as in `AnyPicture`; None: each row's own picture.

    Returns:
        The trained head, and the history: `phase`, `epoch`, `loss`, `score` (before `wise` mixes in the original).
    """
    seed = (*seed, list(HEADS).index(kind))  # orders of their own: averaged, two heads err less than one
    torch.manual_seed(int(np.random.SeedSequence([*seed, 0]).generate_state(1)[0]))
    head = HEADS[kind](start, settings.dropout, settings.hidden)
    model = nn.ModuleDict({"tower": tower, "head": head})
    original = {name: value.clone() for name, value in model.state_dict().items()}
    history = []
    for phase, layers, source, epochs in (
        ("head", nn.Sequential(), Stored(pooled), rates.head_epochs),
        ("tower", tower, inputs, rates.tower_epochs),
    ):
        schedule = Schedule(
            epochs=epochs,
            lr_tower=rates.lr_tower,
            lr_head=rates.lr_head,
            layer_decay=settings.layer_decay,
            mse=settings.mse,
            ema=settings.ema,
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            weight_decay=settings.weight_decay,
            warmup=settings.warmup,
            clip_grad=settings.clip_grad,
            seed=(*seed, 1 + (phase == "tower")),
        )
        if prompts is not None:
            source = AnyPicture(source, prompts, schedule.seed)
        file = resume / f"{kind}-{phase}.safetensors"
        log = fit(layers, head, source, targets, rows, schedule, device, file, watched, f"{kind}, {phase}")
        history += [{"phase": phase, **entry} for entry in log]
    if settings.wise < 1:
        interpolate(model, original, settings.wise)
    return head, pd.DataFrame(history)


@torch.no_grad()
def predict(
    tower: nn.Module, head: nn.Module, views: Sequence[Inputs], rows: np.ndarray, batch_size: int, device: str
) -> np.ndarray:
    """Predict `rows`: (m, t) float32 of norm 1, the mean over the views' predictions, each at norm 1."""
    tower, head = tower.to(device).eval(), head.to(device).eval()
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    parts = []
    for inputs in zip(*(view.batches(batches, None) for view in views), strict=True):
        found = [functional.normalize(head(tower(x.to(device))).float()) for x in inputs]
        parts.append(functional.normalize(sum(found)).cpu().numpy() if len(found) > 1 else found[0].cpu().numpy())
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


def _save(
    path: Path,
    model: nn.Module,
    average: ModelEmaV3 | None,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    history: list,
) -> None:
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    if average:
        tensors |= {f"average.{name}": value.contiguous() for name, value in average.module.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value.contiguous() for name, value in state.items()}
    with whole(path) as aside:
        save_file(tensors, aside, {"history": json.dumps(history), "scaler": json.dumps(scaler.state_dict())})


def _load(
    path: Path,
    model: nn.Module,
    average: ModelEmaV3 | None,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> list:
    weights: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}}
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            kind, _, rest = name.partition(".")
            if kind == "optimiser":
                index, _, key = rest.partition(".")
                state.setdefault(int(index), {})[key] = file.get_tensor(name)
            else:
                weights[kind][rest] = file.get_tensor(name)
        metadata = file.metadata()
    model.load_state_dict(weights["model"])
    if average:
        average.module.load_state_dict(weights["average"])
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    scaler.load_state_dict(json.loads(metadata["scaler"]))
    return json.loads(metadata["history"])
