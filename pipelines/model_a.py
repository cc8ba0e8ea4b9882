"""model_a: for one fold, two heads on the last layers of every CLIP's image tower: one linear layer and the paper's."""

import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import nn

from img2prompt.core.device import device
from img2prompt.core.storage import RESUME, digest, room, whole_folder
from img2prompt.model_a.fold import Features, Fold, TrainRows
from img2prompt.model_a.heads import LinearHead
from img2prompt.model_a.params import ModelAParams
from img2prompt.model_a.training import predict
from pipelines import run

OUTPUTS = Path("outputs")
# What a fold's weights depend on, beside its params: a killed run resumes only if none of it has changed.
DEPENDS = [
    OUTPUTS / "prepare", OUTPUTS / "embed_prompts", OUTPUTS / "dedup", OUTPUTS / "folds", room("core"), room("clip"),
    room("model_a"), Path(__file__),
]  # fmt: skip


def train_clip(rows: TrainRows, number: int, held_out: int, section: ModelAParams, resume: Path, out: Path) -> None:
    """Train both heads on one CLIP and write what `main` says."""
    where = device()
    features = Features.read(OUTPUTS, number, section)
    fold = Fold(rows, features, [held_out], held_out)
    start = fold.start(section.pretrain)
    print(f"fold {held_out}, clip {number}, ridge: strength {start.strength:.0f}, prior {start.share:.2f}")
    test = np.arange(len(np.load(OUTPUTS / f"embed_images/{number}/test_pooled.npy", mmap_mode="r")))
    predicted = (("oof", "train", np.flatnonzero(rows.fold == held_out)), ("test", "test", test))
    for name, split, wanted in predicted:
        head = LinearHead(start, dropout=0.0, hidden=0)
        found = predict(nn.Sequential(), head, features.stored_pooled(split), wanted, 1024, where)
        np.save(out / f"ridge_{name}.npy", found)
    inputs = {split: features.inputs(split, section.augmentation, section.seed, where) for split in ("train", "test")}
    for kind, rates in (("linear", section.linear), ("model_a", section)):
        seed = (section.seed, held_out)
        model, history = fold.train(kind, start, inputs["train"][0], section, rates, seed, where, resume)
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, out / f"{kind}.safetensors")
        history.to_csv(out / f"{kind}_history.csv", index=False)
        for name, split, wanted in predicted:
            found = predict(model["tower"], model["head"], inputs[split], wanted, section.batch_size, where)
            np.save(out / f"{kind}_{name}.npy", found)
        print(f"fold {held_out}, clip {number}, {kind}: {history.score.iloc[-1]:.4f}")


def main(model_a: ModelAParams) -> None:
    """Of every CLIP write {linear,model_a}.safetensors, _oof.npy (fold's rows, 384), _test.npy (m, 384), _history.csv.

    ridge_oof.npy and ridge_test.npy are of the ridge regression on the untouched tower, where both heads start.
    """
    held_out = int(sys.argv[1])
    rows = TrainRows.read(OUTPUTS)
    keys = [
        digest(model_a.model_dump_json(), device(), OUTPUTS / f"clip/{number}", *DEPENDS)
        for number in range(len(list((OUTPUTS / "clip").iterdir())))
    ]
    resume = RESUME / f"model_a/fold_{held_out}"
    for stale in resume.glob("*"):
        if stale.name not in keys:
            shutil.rmtree(stale)
    with whole_folder(OUTPUTS / f"model_a/fold_{held_out}") as out:
        for number, key in enumerate(keys):
            (out / str(number)).mkdir()
            train_clip(rows, number, held_out, model_a, resume / key, out / str(number))
    shutil.rmtree(resume)


if __name__ == "__main__":
    run(main)
