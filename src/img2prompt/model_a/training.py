"""Training with differential learning rates, and prediction."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from img2prompt.core.progress import progress
from img2prompt.core.storage import whole
from img2prompt.model_a.heads import HEADS
from img2prompt.model_a.inputs import AnyImage, Inputs, Stored
from img2prompt.model_a.params import ModelAParams, Rates
from img2prompt.model_a.ridge import Ridge


@dataclass(frozen=True)
class Schedule:
    """One phase of training.

    `lr_tower` and `lr_head` are the peaks of a cosine schedule with a linear warm-up over the share `warmup`
    of the steps; a step sees `batch_size * accumulate` rows. Each layer of the tower has the learning rate
    of the layer after it times `layer_decay`. `mse` is the weight of the mean squared error in the loss, beside the
    cosine. `ema` above 0 takes the exponential moving average of the weights over about this share of the steps.
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
        """The learning rate at `step` of 0 .. steps-1, as a share of its peak."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def parameter_groups(tower: nn.Sequential, head: nn.Module, schedule: Schedule) -> list[dict[str, object]]:
    """Optimiser groups with differential learning rates: every trainable parameter in exactly one.

    The last layer of the tower has `lr_tower`. Biases, the parameters of batch norms and LayerNorms,
    and the w of eq. 3 are not decayed: pulling them to zero would pull predictions off the mean target.
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
    """Sum over rows of 1 - cosine (eq. 7) + mse * mean squared error; (n, t) each, of any norm, to a scalar float32."""
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
    """Train head, and tower where it is not frozen, in place, by `cosine_loss` between predictions and targets.

    After each epoch everything that the next one needs is written to `resume`; if the file is there, training
    resumes from it and ends with the same weights. The tower's batch norms keep their running statistics.

    Args:
        tower: layers in order that map an input to (b, d); parameters without gradients stay as they are.
        head: maps (b, d) to (b, t).
        inputs: of the tower, by row.
        targets: (copies, n, t) float32; each epoch draws one of the copies for every row.
        rows: (m,) the rows that train.
        schedule: learning rates, batch sizes and epochs.
        device: a torch device.
        resume: file of the last finished epoch.
        watched: (w,) rows whose mean cosine is logged after each epoch; training does not depend on them.
        what: label of the progress bar.

    Returns:
        One dict for each epoch: `epoch` from 1, `loss` (mean over training rows), `score` (mean cosine on `watched`).
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
    """WiSE-FT (arXiv 2109.01903): in place, every weight becomes (1 - share) * its `original` + share * itself."""
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
    settings: ModelAParams,
    rates: Rates,
    seed: Sequence[int],
    device: str,
    resume: Path,
    prompts: np.ndarray | None = None,
) -> tuple[nn.Module, pd.DataFrame]:
    """Train one model in two phases: the head alone on the pooled features, then tower and head together (LP-FT).

    Args:
        kind: a key of HEADS.
        start: the ridge regression that the head starts as, fitted on the training rows.
        pooled: (n, d) float32, V(x) of the untouched tower.
        inputs: of `tower`, by row.
        tower: the layers that train, changed in place; if it has none, the second phase continues with the head.
        targets, rows, watched: as in `fit`.
        settings: what both heads share.
        rates: this head's epochs and learning rates.
        seed: of initial weights, order and dropout.
        device: a torch device.
        resume: folder of the files that a killed run resumes from.
        prompts: as in `AnyImage`; None: each row's own image.

    Returns:
        The trained head, and the history: `phase`, `epoch`, `loss`, `score` (before `wise` mixes in original weights).
    """
    # Each head has its own order of rows: their errors differ, so that their mean errs less than one.
    seed = (*seed, list(HEADS).index(kind))
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
            source = AnyImage(source, prompts, schedule.seed)
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
    """Predict `rows`: (m, t) float32 of norm 1, the mean of the views' predictions, each scaled to norm 1."""
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
