"""model_a: for one fold, the paper's head and a linear baseline on the last layers of every CLIP's image tower."""

import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from img2prompt.core import engine, shards
from img2prompt.core.device import device, on_cuda
from img2prompt.core.metric import cosine
from img2prompt.core.storage import numbered, resume_folder, room, whole
from img2prompt.model_a.fold import Features, Fold, TrainRows
from img2prompt.model_a.heads import LinearHead
from img2prompt.model_a.params import ModelAParams
from img2prompt.model_a.prediction import predict
from img2prompt.model_a.trained import save_trained
from pipelines import run

OUTPUTS = Path("outputs")
# What a fold's weights depend on, beside its params: a killed run resumes only if none of it has changed.
DEPENDS = [
    OUTPUTS / "prepare/train.parquet", OUTPUTS / "embed_prompts/train.npy", OUTPUTS / "embed_prompts/augmented.npy",
    OUTPUTS / "embed_prompts/texts.npy", OUTPUTS / "dedup", OUTPUTS / "folds", OUTPUTS / "clip", room("core"),
    room("clip"), room("model_a"), Path(__file__),
]  # fmt: skip


def features_state() -> str:
    """Names, sizes and times of what may be too large to be read for a digest."""
    files = [file for stage in ("embed_images", "freeze") for file in sorted((OUTPUTS / stage).rglob("*.npy"))]
    return "\n".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def train_clip(rows: TrainRows, number: int, held_out: int, section: ModelAParams, resume: Path, out: Path) -> None:
    """Train the heads on one CLIP and write what `main` says."""
    where = device()
    features = Features.read(OUTPUTS, number, section)
    fold = Fold(rows, features, [held_out])
    start = fold.start(section)
    name = f"fold {held_out}, clip {number}"
    print(f"{name}, ridge: strength {start.whole.strength:.0f}, prior {start.whole.share:.2f}")
    unseen = np.flatnonzero(rows.fold == held_out)
    head = LinearHead(start.whole, dropout=0.0, hidden=0)
    save_trained(out / "ridge.safetensors", nn.Sequential(), head, 0, features.views)
    found = {"ridge": predict(nn.Sequential(), head, features.stored_pooled(where), unseen, 1024, where)}
    inputs, choices = features.inputs(section.augmentation, section.seed, where), []
    for kind in sorted(section.heads):
        rates, seed = section.linear if kind == "linear" else section, (section.seed, held_out)
        model, history, choice, unknown = fold.train(kind, start, inputs, section, rates, seed, where, resume)
        save_trained(out / f"{kind}.safetensors", model["tower"], model["head"], features.unfreeze, features.views)
        history.to_csv(out / f"{kind}_history.csv", index=False)
        np.save(out / f"{kind}_validation.npy", unknown)
        choices.append({"head": kind, "trained": start.fitted.sum(), **choice.facts(len(start.validation))})
        found[kind] = predict(model["tower"], model["head"], inputs, unseen, section.batch_size, where)
    pd.DataFrame(choices).to_csv(out / "choices.csv", index=False)
    np.save(out / "validation_rows.npy", start.validation)
    scored = rows.scored[unseen]
    targets, scores = rows.targets[0, unseen][scored], {}
    for kind, predictions in found.items():
        np.save(out / f"{kind}_oof.npy", predictions)
        scores[kind] = float(cosine(predictions[scored], targets).mean()) if scored.any() else float("nan")
    for choice in choices:
        gain = scores[choice["head"]] - scores["ridge"]
        below = ", so BELOW it" if choice["share"] and gain < 0 else ""
        print(
            f"{name}, {choice['head']}: {scores[choice['head']]:.4f}, {gain:+.4f} over its start{below}; validation "
            f"went {choice['share']:.1f} of the way to epoch {choice['epoch']}, for {choice['gain']:+.4f} (error "
            f"{choice['error']:.4f})"
        )


def train_fold(held_out: int, section: ModelAParams, resume: Path, out: Path) -> None:
    """Write of every CLIP what `main` says to a folder that is not there yet."""
    rows = TrainRows.read(OUTPUTS)
    for clip in numbered(OUTPUTS / "clip"):
        (out / clip.name).mkdir(parents=True)
        train_clip(rows, int(clip.name), held_out, section, resume / clip.name, out / clip.name)


def main(model_a: ModelAParams) -> None:
    """Of every CLIP write {ridge,linear,model_a}.safetensors, their _oof.npy (fold's rows, 384), and histories.

    Of the heads, those in `model_a.heads`. `ridge` is the ridge regression on the untouched tower, where both start.
    choices.csv: for each head how far from there training has gone, as rows of the training folds chose that it had
    not seen: validation_rows.npy (v,) int64. {linear,model_a}_validation.npy (v, 384): what it makes of these.
    """
    held_out, where = int(sys.argv[1]), device()
    shelf = resume_folder("model_a", model_a.model_dump_json(), where, features_state(), *DEPENDS)
    trained = shelf / f"fold_{held_out}"
    # DVC runs fold after fold: on a cluster the first one's process trains them all, and the others take theirs.
    every = np.unique(pd.read_parquet(OUTPUTS / "folds/folds.parquet").fold).tolist()
    if not shards.there(trained):
        pieces = [
            engine.Piece(
                f"fold {fold}", partial(train_fold, fold, model_a, shelf / f"state_{fold}"), shelf / f"fold_{fold}"
            )
            for fold in ([held_out] if engine.engine() == "local" else every)
        ]
        for _ in engine.run(pieces, "training folds", "fold", on_cuda(where)):
            pass
    with whole(OUTPUTS / f"model_a/{trained.name}") as out:
        shards.taken(trained, out)
    if not any(shards.there(shelf / f"fold_{fold}") for fold in every):
        shutil.rmtree(shelf)


if __name__ == "__main__":
    run(main)
