"""Training with differential learning rates, watched by validation rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from img2prompt.clip.towers import checkpointed, groups
from img2prompt.core.blocks import Stack, blocks
from img2prompt.core.device import autocast, half_precision, half_products, on_cuda, onto
from img2prompt.core.progress import progress
from img2prompt.core.storage import whole
from img2prompt.model_a.heads import HEADS, LinearHead, PaperHead
from img2prompt.model_a.inputs import AnyImage, Inputs
from img2prompt.model_a.params import ModelAParams, Rates
from img2prompt.model_a.prediction import predict
from img2prompt.model_a.ridge import Ridge
from img2prompt.model_a.validation import LINE, Choice, Gain, Validation, blend

LOWER = 0.25  # by which a rate is lowered that does harm
LOWEST = 5  # times it may be: a thousandth of the rate that was asked for


@dataclass(frozen=True)
class Schedule:
    """How tower and head are trained.

    `lr_tower` and `lr_head` are the peaks of a cosine schedule with a linear warm-up over the share `warmup`
    of the steps; a step sees `batch_size * accumulate` rows. Each layer of the tower has the learning rate
    of the layer after it times `layer_decay`. `mse` is the weight of the mean squared error in the loss, beside the
    cosine, `pull` that of half the head's squared distance from its start. `ema` above 0 takes the exponential moving
    average of the weights over about this share of the steps. `grad_checkpointing` takes less memory for more time.
    """

    epochs: int
    lr_tower: float
    lr_head: float
    layer_decay: float
    mse: float
    pull: float
    ema: float
    batch_size: int
    accumulate: int
    weight_decay: float
    warmup: float
    clip_grad: float
    grad_checkpointing: bool
    seed: tuple[int, ...]

    def factor(self, step: int, steps: int) -> float:
        """The learning rate at `step` of 0 .. steps-1, as a share of its peak."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def parameter_groups(tower: nn.Sequential, head: nn.Module, schedule: Schedule) -> list[dict[str, object]]:
    """Optimiser groups with differential learning rates: every trainable parameter in exactly one.

    The last layer of the tower has `lr_tower`. Only matrices named weight are decayed: not biases, norms, position
    embeddings, tokens, nor the w of eq. 3. Pulling them to zero would pull predictions off the mean target.
    """
    layers = groups(tower)
    rates = [schedule.lr_tower * schedule.layer_decay**behind for behind in reversed(range(len(layers)))]
    parts = [("tower", rate, layer) for rate, layer in zip(rates, layers, strict=True)]
    found: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for of, rate, parameters in [*parts, ("head", schedule.lr_head, dict(head.named_parameters()))]:
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                decay = schedule.weight_decay if parameter.ndim > 1 and name.endswith("weight") else 0.0
                found.setdefault((of, rate, decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "peak": rate, "weight_decay": decay, "of": of}
        for (of, rate, decay), members in found.items()
    ]


def cosine_loss(predicted: Tensor, target: Tensor, mse: float = 0.0) -> Tensor:
    """Sum over rows of 1 - cosine (eq. 7) + mse * mean squared error; (n, t) each, of any norm, to a scalar float32."""
    predicted, target = predicted.float(), target.float()
    loss = (1 - functional.cosine_similarity(predicted, target)).sum()
    return loss + mse * functional.mse_loss(predicted, target, reduction="none").mean(1).sum() if mse else loss


def fit(
    tower: nn.Sequential,
    head: LinearHead | PaperHead,
    inputs: Inputs,
    targets: np.ndarray,
    rows: np.ndarray,
    schedule: Schedule,
    device: str,
    resume: Path,
    validation: Validation,
    what: str,
    parts: np.ndarray | None = None,
    draw: AnyImage | None = None,
) -> tuple[list[dict[str, float]], Choice]:
    """Train head, and tower where it is not frozen, in place, by `cosine_loss` between predictions and targets.

    The weights end at the point that the validation rows choose: the start itself, the end of an epoch, or a point on
    the line from the start to the end (WiSE-FT); where there are no such rows, the start. A rate whose first steps do
    harm is lowered and training begins again, so the rates of the schedule are the most that is tried.

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
        validation: the rows that choose. No gradient comes from them.
        what: label of the progress bar.
        parts: (n,) int, of each row that trains the part of the head's cross-fit; None: every row starts alike.
        draw: which images stand in for the rows in an epoch; None: their own.

    Returns:
        One dict for each epoch: `epoch` from 1, `loss` (mean over training rows), `score` (mean cosine on the
        validation rows); and the choice.
    """
    if not len(validation.rows):
        return [], Choice(0, 0.0, Gain(0.0, 0.0))
    tower, head = tower.to(device), head.to(device)
    start = {name: value.clone() for name, value in nn.ModuleDict({"tower": tower, "head": head}).state_dict().items()}
    before = validation.cosines(tower, head)
    lowered = {"tower": 0, "head": 0}
    with _repeatable(tower, head, validation, parts, what):
        while True:
            run = _Run(tower, head, schedule, len(rows), start, lowered, device)
            if resume.is_file():
                run.load(resume)
                lowered = run.lowered
            harmful = run.epochs(inputs, targets, rows, resume, validation, before, what, parts, draw)
            if harmful is None:
                break
            resume.unlink(missing_ok=True)
            lowered = {name: count + (name in harmful) for name, count in lowered.items()}
            nn.ModuleDict({"tower": tower, "head": head}).load_state_dict(start)
    choice, weights = run.best, run.best_weights
    end = {name: value.clone() for name, value in run.used.state_dict().items()}
    for share in LINE:
        run.model.load_state_dict(blend(start, end, share))
        gain = Gain.of(validation.cosines(tower, head) - before, validation.groups)
        if gain.sure > choice.gain.sure:
            choice, weights = replace(choice, epoch=len(run.history), share=share, gain=gain), None
    if weights is None:
        weights = blend(start, end, choice.share)
    run.model.load_state_dict(weights)
    return run.history, replace(choice, lowered_tower=lowered["tower"], lowered_head=lowered["head"])


@contextmanager
def _repeatable(
    tower: nn.Module, head: nn.Module, validation: Validation, parts: np.ndarray | None, what: str
) -> Iterator[None]:
    """In the block, CUDA's gradients are the same bytes in every run; where that cannot be had, a line says so."""
    if on_cuda(validation.device):
        torch.use_deterministic_algorithms(True)
        x = next(iter(validation.inputs.batches([validation.rows[:2]], None)))
        sizes = None if parts is None else [len(x), *[0] * parts.max()]
        try:
            with autocast(validation.device):
                head(tower(x), sizes).sum().backward()
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            print(f"{what}: another run may end with other bytes: {str(error).splitlines()[0]}")
            torch.use_deterministic_algorithms(True, warn_only=True)
        for parameter in [*tower.parameters(), *head.parameters()]:
            parameter.grad = None
    try:
        yield
    finally:
        if on_cuda(validation.device):
            torch.use_deterministic_algorithms(True, warn_only=True)


def _sizes(parts: np.ndarray, rows: np.ndarray) -> list[int]:
    """Of each part, how many of the rows it has."""
    return np.bincount(parts[rows], minlength=parts.max() + 1).tolist()


class _Run:
    """A training with one pair of rates, from the start or from where it was killed."""

    def __init__(
        self,
        tower: nn.Sequential,
        head: LinearHead | PaperHead,
        schedule: Schedule,
        rows: int,
        start: dict[str, Tensor],
        lowered: dict[str, int],
        device: str,
    ) -> None:
        self.tower, self.head, self.schedule, self.device, self.start = tower, head, schedule, device, start
        self.model = nn.ModuleDict({"tower": tower, "head": head})
        self.per_step = schedule.batch_size * schedule.accumulate
        self.steps_per_epoch = math.ceil(rows / self.per_step)
        self.steps = schedule.epochs * self.steps_per_epoch
        self.scaler = torch.amp.GradScaler("cuda", enabled=on_cuda(device) and half_precision(device) is torch.float16)
        share = schedule.ema * self.steps
        self.average = ModelEmaV3(self.model, 1 - 1 / max(1.0, share)) if schedule.ema else None
        self.used = self.average.module if self.average else self.model
        self.optimiser = torch.optim.AdamW(parameter_groups(tower, head, schedule), fused=True)
        self.trained = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        self.history: list[dict[str, float]] = []
        self.best, self.best_weights = Choice(0, 0.0, Gain(0.0, 0.0)), start
        self.lowered = lowered

    def epochs(
        self,
        inputs: Inputs,
        targets: np.ndarray,
        rows: np.ndarray,
        resume: Path,
        validation: Validation,
        before: np.ndarray,
        what: str,
        parts: np.ndarray | None,
        draw: AnyImage | None,
    ) -> set[str] | None:
        """Train the epochs that are left; None, or which of `tower` and `head` does harm, as soon as it shows."""
        schedule = self.schedule
        # A rate that is too high has done its harm when the warm-up is over and as much again.
        looks = {max(1, times * math.ceil(schedule.warmup * self.steps)) for times in (1, 2)}
        epochs = progress(range(len(self.history), schedule.epochs), what, unit="epoch")
        for epoch in epochs:
            rng = np.random.default_rng([*schedule.seed, epoch])
            torch.manual_seed(int(rng.integers(2**63)))  # dropout
            order = rng.permutation(rows)
            micro = [
                (step, slice(start, min(start + schedule.batch_size, len(order))))
                for step in range(self.steps_per_epoch)
                for start in range(
                    step * self.per_step, min((step + 1) * self.per_step, len(order)), schedule.batch_size
                )
            ]
            last = {step: number for number, (step, _) in enumerate(micro)}
            if parts is not None:  # rows of a part side by side, as the head wants them
                for _, batch in micro:
                    order[batch] = order[batch][np.argsort(parts[order[batch]], kind="stable")]
            copy = rng.integers(len(targets), size=len(order))
            seen = order if draw is None else draw(order, epoch)
            losses: list[Tensor] = []
            self._train()
            batches = inputs.batches([seen[batch] for _, batch in micro], epoch)
            wanted = onto((torch.from_numpy(targets[copy[batch], seen[batch]]) for _, batch in micro), self.device)
            for number, ((step, batch), x, target) in enumerate(zip(micro, batches, wanted, strict=True)):
                with half_products(self.device):
                    with autocast(self.device):
                        x = checkpointed(self.tower, x) if schedule.grad_checkpointing else self.tower(x)
                        predicted = self.head(x, None if parts is None else _sizes(parts, order[batch]))
                    loss = cosine_loss(predicted, target, schedule.mse)
                    losses.append(loss.detach())
                    # The last step of an epoch may be smaller: every row weighs the same within its step.
                    loss = loss / min(self.per_step, len(order) - step * self.per_step)
                    self.scaler.scale(loss).backward()
                if number < last[step]:
                    continue
                done = epoch * self.steps_per_epoch + step + 1
                self._step(done - 1)
                if done in looks:
                    if harmful := self._harmful(validation, before):
                        return harmful
                    self._train()
            after = validation.cosines(self.used["tower"], self.used["head"])
            loss = float(torch.stack(losses).cpu().double().sum()) / len(order)
            self.history.append({"epoch": epoch + 1, "loss": loss, "score": float(after.mean())})
            gain = Gain.of(after - before, validation.groups)
            if gain.sure > self.best.gain.sure:
                weights = {name: value.clone() for name, value in self.used.state_dict().items()}
                self.best, self.best_weights = Choice(epoch + 1, 1.0, gain), weights
            epochs.set_postfix(score=f"{after.mean():.4f}", refresh=False)
            self.save(resume)
        return None

    def _train(self) -> None:
        self.tower.eval()
        self.head.train()

    def _step(self, step: int) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * self.schedule.factor(step, self.steps) * LOWER ** self.lowered[group["of"]]
        self.scaler.unscale_(self.optimiser)
        if self.schedule.pull:
            self.head.pull(self.schedule.pull)
        nn.utils.clip_grad_norm_(self.trained, self.schedule.clip_grad)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        if self.average:
            self.average.update(self.model)

    def _harmful(self, validation: Validation, before: np.ndarray) -> set[str]:
        """Whose rate does harm, as the weights are now: `tower`, `head`, neither, or both where neither does alone."""
        if max(self.lowered.values()) >= LOWEST or not validation.harmful(
            before, validation.cosines(self.tower, self.head)
        ):
            return set()
        now = {name: value.clone() for name, value in self.model.state_dict().items()}
        found = set()
        for name in ("tower", "head"):
            alone = {key: (now if key.startswith(f"{name}.") else self.start)[key] for key in now}
            self.model.load_state_dict(alone)
            if validation.harmful(before, validation.cosines(self.tower, self.head)):
                found.add(name)
        return found or {"tower", "head"}

    def save(self, path: Path) -> None:
        """Write all that the next epoch needs."""
        modules = {"model": self.model.state_dict()}
        if self.average:
            modules["average"] = self.average.module.state_dict()
        if self.best.epoch:
            modules["best"] = self.best_weights
        tensors = {
            f"{kind}.{name}": value.contiguous() for kind, state in modules.items() for name, value in state.items()
        }
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value.contiguous() for name, value in state.items()}
        facts = {
            "history": self.history, "scaler": self.scaler.state_dict(), "best": asdict(self.best),
            "lowered": self.lowered,
        }  # fmt: skip
        with whole(path) as aside:
            save_file(tensors, aside, {"facts": json.dumps(facts)})

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        weights: dict[str, dict[str, Tensor]] = {}
        state: dict[int, dict[str, Tensor]] = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                kind, _, rest = name.partition(".")
                if kind == "optimiser":
                    index, _, key = rest.partition(".")
                    state.setdefault(int(index), {})[key] = file.get_tensor(name)
                else:
                    weights.setdefault(kind, {})[rest] = file.get_tensor(name)
            facts = json.loads(file.metadata()["facts"])
        self.model.load_state_dict(weights["model"])
        if self.average:
            self.average.module.load_state_dict(weights["average"])
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.scaler.load_state_dict(facts["scaler"])
        self.history, self.lowered = facts["history"], facts["lowered"]
        self.best = Choice(**facts["best"] | {"gain": Gain(**facts["best"]["gain"])})
        self.best_weights = weights.get("best", self.start)


@dataclass(frozen=True)
class Start:
    """Where training starts, and which rows watch it.

    `whole` is the ridge regression of all training rows, `fitted` (n,) bool the rows that train, `inner` their ridge
    regression, `parts` (n,) int their parts (others: -1) and `others` the regression without each; None and none
    where there are too few groups for parts. `validation` (v,) int64 are the rows that watch.
    """

    whole: Ridge
    fitted: np.ndarray
    validation: np.ndarray
    inner: Ridge
    parts: np.ndarray | None
    others: Sequence[Ridge]


def train(
    kind: str,
    start: Start,
    pooled: np.ndarray,
    views: Sequence[Inputs],
    tower: nn.Sequential,
    targets: np.ndarray,
    groups: np.ndarray,
    settings: ModelAParams,
    rates: Rates,
    seed: Sequence[int],
    device: str,
    resume: Path,
    stands_for: np.ndarray | None = None,
) -> tuple[LinearHead | PaperHead, pd.DataFrame, Choice, np.ndarray]:
    """Train tower and head from the ridge regression of the rows that are not for validation, as far as those choose.

    Then the start gets the validation rows back: what training changed is added to the regression of all training
    rows. So where nothing better was found the model is the ridge regression of all of them on the untouched tower.

    What keeps the head near its start is a pull towards it (L2-SP, arXiv 1802.01483) as strong as the ridge
    regression's own penalty times `settings.pull`. Each row trains against the regression without its part: its
    error is then what it would be on a new image, not what is left after a fit to this very row.

    Args:
        kind: a key of HEADS.
        start: see Start.
        pooled: (n, d) float32, V(x) of the untouched tower.
        views: the inputs of `tower`, by row, of each view of the images; the first one trains.
        tower: the layers that train, changed in place; if it has none, the head alone trains.
        targets: as in `fit`.
        groups: (n,) int, equal for similar prompts.
        settings: what both heads share.
        rates: this head's epochs and learning rates.
        seed: of initial weights, order and dropout.
        device: a torch device.
        resume: folder of the files that a killed run resumes from.
        stands_for: (n,) int64, as in `AnyImage`; None: each row's own image.

    Returns:
        The trained head, the history (`epoch`, `loss`, `score`), the choice, and (v, t) float32, norm 1: what the
        trained model makes of the v validation rows while it does not know them, so before the start gets them back.
    """
    # Each head has its own order of rows: their errors differ, so that their mean errs less than one.
    seed = (*seed, list(HEADS).index(kind))
    rows, watch = np.flatnonzero(start.fitted), start.validation
    heads = {}
    for name, regression, others in (("whole", start.whole, ()), ("inner", start.inner, start.others)):
        torch.manual_seed(int(np.random.SeedSequence([*seed, 0]).generate_state(1)[0]))
        heads[name] = HEADS[kind](regression, settings.dropout, settings.hidden, others)
    head = heads["inner"]
    before = {name: value.clone() for name, value in head.state_dict().items()}
    steps_per_epoch = math.ceil(len(rows) / (settings.batch_size * settings.accumulate))
    schedule = Schedule(
        epochs=max(rates.epochs, math.ceil(settings.steps / steps_per_epoch)),
        lr_tower=rates.lr_tower,
        lr_head=rates.lr_head,
        layer_decay=settings.layer_decay,
        mse=settings.mse,
        pull=settings.pull * start.inner.strength / len(rows) / _size(start.inner, Stack([pooled], rows)),
        ema=settings.ema,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        weight_decay=settings.weight_decay,
        warmup=settings.warmup,
        clip_grad=settings.clip_grad,
        grad_checkpointing=settings.grad_checkpointing,
        seed=(*seed, 1),
    )
    validation = Validation(
        views[0], watch, targets[0, watch], groups[watch], _floor(targets[0], rows, watch), settings.batch_size, device
    )
    draw = None if stands_for is None else AnyImage(stands_for, schedule.seed)
    history, choice = fit(
        tower, head, views[0], targets, rows, schedule, device, resume / f"{kind}.safetensors", validation,
        kind, start.parts, draw,
    )  # fmt: skip
    unknown = predict(tower, head, views, watch, settings.batch_size, device).reshape(len(watch), targets.shape[-1])
    tower.to("cpu")
    give_back(head.to("cpu"), before, heads["whole"].state_dict())
    return head, pd.DataFrame(history, columns=["epoch", "loss", "score"]), choice, unknown


def give_back(head: nn.Module, start: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """In place, add what training changed since `start` to the weights `whole`, which are of more rows."""
    for name, value in head.state_dict().items():
        if value.is_floating_point():
            value.copy_(whole[name] + (value - start[name]))


def _size(start: Ridge, pooled: Stack) -> float:
    """The mean norm of the regression's predictions: the cosine's gradient is the squared error's, divided by it."""
    total = 0.0
    for rows in blocks(len(pooled)):
        x = (torch.from_numpy(pooled[rows]) - start.mean) / start.std
        total += float((x @ start.weight.T + start.bias).norm(dim=1).sum())
    return total / len(pooled)


def _floor(targets: np.ndarray, rows: np.ndarray, watch: np.ndarray) -> float:
    mean = targets[rows].mean(0)
    return float((targets[watch] @ mean).mean() / np.linalg.norm(mean)) if len(watch) else 0.0
