"""Model A's trained models of all folds on one CLIP, as files and as one function of an image's features."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from img2prompt.clip.model import Clip
from img2prompt.clip.towers import tower, unfrozen
from img2prompt.core.device import autocast
from img2prompt.model_a.heads import HEADS, LinearHead
from img2prompt.model_a.ridge import Ridge

KINDS = ("ridge", *HEADS)  # the family: the start of both heads, and the heads


def save_trained(path: Path, last: nn.Module, head: nn.Module, unfreeze: int, views: Sequence[str]) -> None:
    """Write the layers that were trained with a head as safetensors; parameters that did not train are CLIP's own.

    unfreeze: the number of these layers. views: the views whose predictions are averaged, the plain one first.
    """
    model = nn.ModuleDict({"tower": last, "head": head})
    weights = model.state_dict()
    for name in _untrained(model):
        del weights[name]
    # One entry: safetensors writes several in any order, and equal weights would be other bytes.
    metadata = {"settings": json.dumps({"unfreeze": unfreeze, "views": list(views)})}
    save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata)


@dataclass(frozen=True)
class Trained:
    """Model A's family on one CLIP: for every kind in use, the models of all folds.

    unfreeze: how many of the tower's last layers were trained, so which layers' output is the input here. views: whose
    predictions are averaged, the plain one first.
    """

    models: Mapping[str, Sequence[nn.Sequential]]
    unfreeze: int
    views: Sequence[str]

    @classmethod
    def load(cls, folders: Sequence[Path], clip: Clip, device: str, kinds: Collection[str] | None = None) -> Trained:
        """Load the files ridge.safetensors, linear.safetensors and model_a.safetensors of every fold's folder.

        clip: the one that they were trained on; it is not changed. kinds: some of KINDS; the others' files may be gone.
        None: those that the first folder has.

        Raises:
            OSError, ValueError: a file is missing, or is of another CLIP.
        """
        if kinds is None:
            kinds = [kind for kind in KINDS if (folders[0] / f"{kind}.safetensors").is_file()]
        models: dict[str, list[nn.Sequential]] = {kind: [] for kind in KINDS if kind in kinds}
        layers = tower(clip.model.visual)
        depths: set[int] = set()
        views: set[tuple[str, ...]] = set()
        for folder in folders:
            for kind in models:
                path = folder / f"{kind}.safetensors"
                with safe_open(path, "pt", device=device) as file:
                    stored = json.loads(file.metadata()["settings"])
                    weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                views.add(tuple(stored["views"]))
                if kind != "ridge":
                    depths.add(stored["unfreeze"])
                last = unfrozen(layers, stored["unfreeze"])
                models[kind].append(_model(path, kind, last, weights).to(device).eval())
        if len(depths) > 1 or len(views) > 1:
            raise ValueError(
                f"{folders[0].parent.parent}: the folds were trained with other settings: train them again"
            )
        return cls(models, max(depths, default=0), next(iter(views), ("plain",)))

    def only(self, kinds: Collection[str], views: int | None = None) -> Trained:
        """Some of its kinds, with the first of its views or, by default, all of them."""
        left = {kind: models for kind, models in self.models.items() if kind in kinds}
        return replace(self, models=left, views=self.views[:views])

    @torch.no_grad()
    def __call__(self, pooled: Sequence[Tensor | None], frozen: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Predict a batch: by kind (b, 384) float32, the mean of the folds' predictions, each at norm 1.

        A fold's prediction is the mean of the views', each at norm 1, at norm 1 again.

        Args:
            pooled: for each view V(x) of the untouched tower, (b, d) float32.
            frozen: for each view the input of the layers that were trained, (b, ...); without such layers as `pooled`.
                What no kind in use needs may be None.
        """
        found = {}
        for kind, models in self.models.items():
            inputs = pooled if kind == "ridge" else frozen
            folds = []
            for model in models:
                with autocast(inputs[0].device.type):
                    seen = [model(x.float()).float() for x in inputs]
                seen = [functional.normalize(of_view) for of_view in seen]
                folds.append(functional.normalize(sum(seen)) if len(seen) > 1 else seen[0])
            found[kind] = torch.stack(folds).mean(0)
        return found


def _untrained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.data for name, value in model.named_parameters() if not value.requires_grad}


def _model(path: Path, kind: str, layers: nn.Sequential, weights: dict[str, Tensor]) -> nn.Sequential:
    """A tower's last layers with a head, from the tensors that `save_trained` wrote."""
    name = "head.fc1" if kind == "model_a" else "head"
    enter = weights.get(f"{name}.wide.enter.weight")
    width, features = weights[f"{name}.fc.weight"].shape
    zeros = torch.zeros(width, features)
    start = Ridge(torch.zeros(features), torch.ones(features), zeros, torch.zeros(width), 0.0, 0.0, 0.0)
    head = (LinearHead if kind == "ridge" else HEADS[kind])(start, 0.0, 0 if enter is None else len(enter))
    model = nn.ModuleDict({"tower": layers, "head": head})
    try:
        model.load_state_dict(_untrained(model) | weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: not of this CLIP: {str(error).splitlines()[-1].strip()}") from None
    return nn.Sequential(model["tower"], model["head"])
