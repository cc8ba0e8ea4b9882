"""model_a: the head on stored features against a DataLoader's loop, and the sample's tower against timm's modules."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from bench import ridge
from bench.harness import Task, Work, deviation
from bench.ridge import FOLDS
from img2prompt.cli.check import load_params
from img2prompt.clip import efficientnet
from img2prompt.core.metric import cosine
from img2prompt.model_a.fold import Fold, TrainRows
from img2prompt.model_a.heads import PaperHead
from img2prompt.model_a.inputs import Stored
from img2prompt.model_a.params import ModelAParams
from img2prompt.model_a.prediction import predict
from img2prompt.model_a.training import Start
from img2prompt.sample import small_clip

BATCH, EPOCHS, RATE = 64, 10, 1e-3  # of the loop that starts from random weights
LAYERS, SIDE = 5, 128  # of the tower: those that train, and the images'


def settings() -> ModelAParams:
    """What docs/experiments.md takes at the paper's size: a frozen tower, and larger steps at a higher rate."""
    return load_params().model_a.model_copy(update={"unfreeze": 0, "batch_size": 256, "lr_head": 0.0002})


def fold_of(pooled: np.ndarray, targets: np.ndarray, held_out: int = 0, kept: np.ndarray | None = None) -> Fold:
    """Rows in five folds, one of them held out, on features that are stored."""
    n = len(pooled)
    kept = np.ones(n, dtype=bool) if kept is None else kept
    rows = TrainRows(
        targets=targets[None],
        fold=np.arange(n) % FOLDS,
        group=np.arange(n),
        kept=kept,
        scored=kept,
        stands_for=np.where(kept, np.arange(n), -1),
        texts_targets=targets[:0],
        texts_kept=np.zeros(0, dtype=bool),
        texts_near=np.zeros((0, FOLDS), dtype=bool),
    )
    return Fold(rows, SimpleNamespace(pooled=pooled, last=nn.Sequential()), [held_out])


def head(pooled: np.ndarray, targets: np.ndarray, held_out: int = 0, kept: np.ndarray | None = None) -> nn.ModuleDict:
    """The paper's head, `tower` and `head`, as the stage trains it."""
    fold = fold_of(pooled, targets, held_out, kept)
    return trained(fold, fold.start(settings()))


def trained(fold: Fold, start: Start) -> nn.ModuleDict:
    section, inputs = settings(), Stored(fold.features.pooled)
    with tempfile.TemporaryDirectory() as resume:
        seed = (section.seed, *fold.unseen)
        return fold.train("model_a", start, [inputs], section, section, seed, "cpu", Path(resume))[0]


def on_unseen(model: nn.ModuleDict, pooled: np.ndarray) -> np.ndarray:
    """Predictions for the first fold."""
    return predict(model["tower"], model["head"], [Stored(pooled)], np.arange(0, len(pooled), FOLDS), 1024, "cpu")


def epochs(rows: int) -> int:
    """How many the stage takes on so many rows that train."""
    section = settings()
    return max(section.epochs, math.ceil(section.steps / math.ceil(rows / section.batch_size)))


def make(folder: Path, rows: int) -> Work:
    """As for the ridge regression. The work: both layers' products, forward and twice backward, in all epochs."""
    ridge.make(folder, rows)
    trained = rows * (FOLDS - 1) // FOLDS
    return Work(operations=6.0 * 384 * (ridge.WIDTH + 384) * trained * epochs(trained))


def load(folder: Path, rows: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Features, targets, and the score that ours has had."""
    goal = folder / "goal"
    return *ridge.load(folder, rows), float(goal.read_text()) if goal.is_file() else math.inf


def ours(pooled: np.ndarray, targets: np.ndarray, goal: float) -> np.ndarray:
    return on_unseen(head(pooled, targets), pooled)


def load_started(folder: Path, rows: int) -> tuple[Fold, Start]:
    """The first fold, and its start."""
    fold = fold_of(*ridge.load(folder, rows))
    return fold, fold.start(settings())


def ours_from_start(fold: Fold, start: Start) -> np.ndarray:
    return on_unseen(trained(fold, start), fold.features.pooled)


class Paper(nn.Module):
    """The paper's head, eq. 1-3, from random weights."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width))
        self.second = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.w = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, t)."""
        first = self.first(x)
        return self.w * first + (1 - self.w) * self.second(first)


def loop(
    model: nn.Module, x: Tensor, y: Tensor, x_unseen: Tensor, y_unseen: Tensor, epochs: int, rate: float, goal: float
) -> np.ndarray:
    """Train a head as people do, until its score on the unseen rows is the goal; the predictions of these."""
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * len(loader))
    for _ in range(epochs):
        model.train()
        for features, targets in loader:
            optimiser.zero_grad()
            (1 - functional.cosine_similarity(model(features), targets)).mean().backward()
            optimiser.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            found = model(x_unseen)
        if functional.cosine_similarity(found, y_unseen).mean() >= goal:
            break
    return found.numpy()


def split(pooled: np.ndarray, targets: np.ndarray) -> list[Tensor]:
    """Features and targets of the rows that train, then of the first fold."""
    unseen = np.arange(len(pooled)) % FOLDS == 0
    return [torch.from_numpy(array[rows]) for rows in (~unseen, unseen) for array in (pooled, targets)]


def from_random(pooled: np.ndarray, targets: np.ndarray, goal: float) -> np.ndarray:
    torch.manual_seed(0)
    return loop(Paper(pooled.shape[1], targets.shape[1]), *split(pooled, targets), EPOCHS, RATE, goal)


def loop_from_start(fold: Fold, start: Start) -> np.ndarray:
    """With the epochs of ours, and the rate of params.yaml, which is for these batches."""
    torch.manual_seed(0)
    section, parts = load_params().model_a, split(fold.features.pooled, fold.rows.targets[0])
    model = PaperHead(start.whole, section.dropout, 0)
    return loop(model, *parts, epochs(len(parts[0])), section.lr_head, math.inf)


def check(predicted: np.ndarray, folder: Path) -> str:
    """The score on the first fold; that of ours, which is checked first, is the others' goal."""
    score, goal = float(cosine(predicted, ridge.load(folder)[1][::FOLDS]).mean()), folder / "goal"
    if not goal.is_file():
        goal.write_text(repr(score))
    return f"score {score:.4f}"


def trunk() -> nn.Module:
    return small_clip.untrained("lite0", 0, SIDE)[0].visual.trunk


def timm_layers(trunk: nn.Module) -> nn.Sequential:
    blocks = [block for stage in trunk.blocks for block in stage]
    head = nn.Sequential(trunk.conv_head, trunk.bn2, trunk.global_pool)
    return nn.Sequential(nn.Sequential(trunk.conv_stem, trunk.bn1), *blocks, head)


def our_layers(trunk: nn.Module) -> nn.Sequential:
    return nn.Sequential(*efficientnet.layers(trunk))


def make_inputs(folder: Path, rows: int) -> Work:
    """inputs.npy, of the layers that train, targets.npy, and right.npy, the gradient of the first batch by timm."""
    torch.manual_seed(0)
    of = trunk().eval()
    with torch.no_grad():
        frozen = timm_layers(of)[:-LAYERS].to(memory_format=torch.channels_last)
        x = frozen(torch.randn(BATCH, 3, SIDE, SIDE).to(memory_format=torch.channels_last))
    np.save(folder / "inputs.npy", x.numpy())
    np.save(folder / "targets.npy", functional.normalize(torch.randn(BATCH, of.num_features)).numpy())
    np.save(folder / "right.npy", steps(timm_layers, *load_inputs(folder, BATCH)))
    return Work()


def load_inputs(folder: Path, rows: int) -> tuple[nn.Module, Tensor, Tensor, int]:
    """The tower, one batch, and how often it is to be trained on."""
    x, targets = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("inputs", "targets"))
    return trunk(), x.to(memory_format=torch.channels_last), targets, max(1, rows // BATCH)


def steps(
    layers: Callable[[nn.Module], nn.Sequential], of: nn.Module, x: Tensor, targets: Tensor, count: int
) -> np.ndarray:
    """Train for so many steps; the gradient of the first."""
    tower = layers(of)[-LAYERS:].to(memory_format=torch.channels_last).eval()
    optimiser, gradients = torch.optim.AdamW(tower.parameters(), lr=1e-4), []
    for _ in range(count):
        (1 - functional.cosine_similarity(tower(x), targets)).mean().backward()
        if not gradients:
            gradients = [parameter.grad.flatten().clone() for parameter in tower.parameters()]
        optimiser.step()
        optimiser.zero_grad()
    return torch.cat(gradients).numpy()


def check_gradient(found: np.ndarray, folder: Path) -> str:
    right = np.load(folder / "right.npy")
    return deviation(float(np.linalg.norm(found - right) / np.linalg.norm(right)))


TASKS = [
    Task(
        "model_a: head",
        make,
        load,
        {"ours": ours, "DataLoader, to our score": from_random},
        check,
        growth={"": 1},
        by_flag=("ours",),
    ),
    Task(
        "model_a: head, from its start",
        make,
        load_started,
        {"ours": ours_from_start, "DataLoader": loop_from_start},
        check,
        growth={"": 1},
        by_flag=("ours",),
    ),
    Task(
        "model_a: tower",
        make_inputs,
        load_inputs,
        {"ours": partial(steps, our_layers), "timm's modules": partial(steps, timm_layers)},
        check_gradient,
        growth={"": 1},
        most=1280,
        warm=BATCH,
    ),
]
