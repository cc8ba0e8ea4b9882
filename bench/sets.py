"""The recipe on data that it was not tuned on: out of fold, every set and seed against the ridge regression.

    python bench/sets.py FOLDER --seeds 0 1 2 --real aiart=/data/aiart --sets sample sample-330 shuffled tails aiart

The sets, all with params.yaml as it is: the sample, whole and with 330 and 800 rows; with 1,500 at 256 pixels; with a
third of its prompts shuffled; with a long tail of 500 prompts; and competitions with `train` and `test` in a folder.
`model_a.seed` and `folds.seed` are the seed. FOLDER keeps each stage's outputs, so that a second call goes on, or
only writes the tables: one with a row for each run, and the means over all seeds that a set has there, which `--docs`
puts into docs/results.md. Differences are paired by picture, with 95% intervals over groups of similar prompts.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from img2prompt.cli.documents import caption, put
from img2prompt.core.images import read_image
from img2prompt.core.metric import bootstrap_interval, unit
from img2prompt.core.process import records
from img2prompt.report.scores import markdown

ROOT = Path(__file__).resolve().parent.parent
PREPARED = ("prepare", "embed_prompts", "dedup", "clip", "embed_images", "freeze")  # the seed changes none of these
SEEDED = ("folds", *(f"model_a {fold}" for fold in range(5)), "knn", "ensemble")
MEMBERS = ("ridge", "model_a", "model_b")
SAMPLE = {
    "sample": {},
    "sample-330": {"prepare": {"sample": {"n_train": 330}}},
    "sample-800": {"prepare": {"sample": {"n_train": 800}}},
    "sample-256px": {"prepare": {"sample": {"n_train": 1500}}, "clip": {"image_size": 256}},
}


def merged(params: dict, changes: dict) -> dict:
    """params with changes, section by section."""
    return params | {k: merged(params[k], v) if isinstance(v, dict) else v for k, v in changes.items()}


def run(home: Path, params: dict, stages: tuple[str, ...]) -> None:
    """Run in home the stages that have left no output there, with these params."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "input").mkdir(exist_ok=True)
    (home / "params.yaml").write_text(yaml.safe_dump(params))
    path = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    for stage in stages:
        name, *fold = stage.split()
        if not home.joinpath("outputs", name, *(f"fold_{number}" for number in fold)).exists():
            command = [sys.executable, "-m", f"pipelines.{name}", *fold]
            subprocess.run(command, cwd=home, env={**os.environ, "PYTHONPATH": path}, check=True)


def shuffled(prompts: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The prompts (n,), a third of them in one another's place."""
    picked, found = rng.permutation(len(prompts))[: len(prompts) // 3], prompts.copy()
    found[picked] = prompts[rng.permutation(picked)]
    return found


def tails(prompts: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each prompt (n,) with its embedding (n, d), one of the 20 of 500 that are most like it, by Zipf's law."""
    picked, targets = rng.permutation(len(prompts))[:500], unit(targets)
    near = np.argsort(-(targets @ targets[picked].T), axis=1, kind="stable")[:, :20]
    weights = 1 / (1 + near)  # the place among the 500 is the rank
    weights /= weights.sum(axis=1, keepdims=True)
    chosen = [rng.choice(row, p=weight) for row, weight in zip(near, weights, strict=True)]
    return prompts[picked[chosen]]


MADE: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "shuffled": shuffled,
    "tails": tails,
}


def make(name: str, sample: Path, home: Path) -> None:
    """Write the prepared sample's pictures with other prompts as a competition in home."""
    if home.exists():
        return
    rows, part = pd.read_parquet(sample / "outputs/prepare/train.parquet"), home.with_name(f"{home.name}.part")
    targets = np.load(sample / "outputs/embed_prompts/train.npy")
    prompts = MADE[name](rows.prompt.to_numpy(), targets, np.random.default_rng(7))
    (part / "images").mkdir(parents=True, exist_ok=True)
    for image, reference in zip(rows.id, rows.image, strict=True):
        (part / "images" / f"{image}.png").write_bytes(read_image(str(sample / reference)))
    pd.DataFrame({"imgId": rows.id, "prompt": prompts}).to_csv(part / "prompts.csv", index=False)
    part.rename(home)


def cells(oofs: list[pd.DataFrame]) -> list[str]:
    """The scores of one set, of the scored pictures: each picture's mean over the seeds."""
    members = [*MEMBERS, "ensemble"]
    mean, group = sum(oof[members].astype(float) for oof in oofs) / len(oofs), oofs[0].group

    def difference(member: str, other: str) -> str:
        values = mean[member] - mean[other]
        low, high = bootstrap_interval(values, group)
        return f"{values.mean():+.4f} [{low:+.4f}, {high:+.4f}]"

    best = max(MEMBERS, key=lambda member: mean[member].mean())
    return [
        f"{mean.ridge.mean():.4f}", difference("model_a", "ridge"),
        f"{mean.model_b.mean():.4f}", f"{mean.ensemble.mean():.4f}", f"{difference('ensemble', best)} ({best})",
    ]  # fmt: skip


def read_oof(home: Path) -> pd.DataFrame:
    oof = pd.read_parquet(home / "outputs/ensemble/oof.parquet")
    return oof[oof.scored]


def choices(home: Path) -> list[str]:
    """How far each fold's head went, and how many of them with a lowered rate."""
    found = pd.concat([pd.read_csv(file) for file in sorted(home.glob("outputs/model_a/fold_*/0/choices.csv"))])
    return [
        " ".join(f"{share:.1f}" for share in found["share"]),
        str(int(((found.lowered_tower > 0) | (found.lowered_head > 0)).sum())),
    ]


def table(titles: list[str], rows: list[list[str]]) -> str:
    return markdown([titles, ["---"] * len(titles), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="+", default=[*SAMPLE, *MADE])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--real", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--docs", action="store_true", help="put the means over seeds into docs/results.md")
    args = parser.parse_args()
    params, folder = yaml.safe_load((ROOT / "params.yaml").read_text()), args.folder.resolve()
    real = dict(named.split("=", 1) for named in args.real)
    for name in args.sets:
        if name in MADE:
            run(folder / "sample", params, PREPARED[:2])
            make(name, folder / "sample", folder / "made" / name)
            made = str(folder / "made" / name)
            changed = merged(params, {"prepare": {"train": [made], "test": made}})  # no stage here reads the test
        elif name in real:
            at = Path(real[name]).resolve()
            changed = merged(params, {"prepare": {"train": [str(at / "train")], "test": str(at / "test")}})
        elif name in SAMPLE:
            changed = merged(params, SAMPLE[name])
        else:
            parser.error(f"--sets: {name} is none of {', '.join([*SAMPLE, *MADE, *real])}")
        run(folder / name, changed, PREPARED)
        for seed in args.seeds:
            home = folder / f"{name}.{seed}"
            (home / "outputs").mkdir(parents=True, exist_ok=True)
            for stage in PREPARED:
                link = home / "outputs" / stage
                if not link.is_symlink():
                    link.symlink_to(folder / name / "outputs" / stage)
            run(home, merged(changed, {"folds": {"seed": seed}, "model_a": {"seed": seed}}), SEEDED)
    scores = ["ridge", "Model A minus ridge", "Model B", "ensemble", "minus its best member"]
    homes = {
        name: [home for home in sorted(folder.glob(f"{name}.[0-9]*")) if (home / "outputs/ensemble").is_dir()]
        for name in args.sets
    }
    each = [[name, home.suffix[1:], *cells([read_oof(home)]), *choices(home)] for name in homes for home in homes[name]]
    print(table(["set", "seed", *scores, "share of the way, by fold", "rates lowered"], each))
    oofs = {name: [read_oof(home) for home in homes[name]] for name in homes}
    mean = [[name, f"{len(found[0]):,}", str(len(found)), *cells(found)] for name, found in oofs.items()]
    ran = [folder / name for name in homes] + [home for name in homes for home in homes[name]]
    made = [record for home in ran for record in records(home / "outputs/run.js")]
    means = f"{table(['set', 'scored prompts', 'seeds', *scores], mean)}\n{caption('Means over seeds', made)}"
    print(means)
    if args.docs:
        put({"sets": means}, ROOT)


if __name__ == "__main__":
    main()
