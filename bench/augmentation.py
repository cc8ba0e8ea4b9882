"""The paper's augmentation (section 3.5.1), each kind alone and all together: what Model A gains, and what it costs.

    python -m bench.augmentation sample=. tuxpaint=FOLDER aiart=FOLDER --seeds 0 1 2

Each folder holds outputs/ of a run, its name the set's. Model A is trained on an inner split of the folds but the one
held out, and scored on another of these, so the held-out fold is never used. Gains are over no augmentation, picture
by picture, as means over seeds, with 95% intervals over groups of similar prompts; `lowest seed` is the least gain of
any one. With images that are augmented frozen layers run in every epoch, which is in the seconds of one training.
"""

import argparse
import contextlib
from pathlib import Path

import numpy as np

from bench.inner import NONE, InnerSplit
from img2prompt.cli.check import Params, load_params
from img2prompt.cli.documents import caption
from img2prompt.core.device import device
from img2prompt.core.metric import bootstrap_interval, cosine
from img2prompt.core.process import made
from img2prompt.core.rows import read_rows
from img2prompt.model_a.fold import TrainRows
from img2prompt.model_a.params import Augmentation
from img2prompt.prompts.augmentation import augment_prompt, thesaurus
from img2prompt.prompts.encoder import Encoder
from img2prompt.report.scores import markdown

IMAGES = {
    "crop, up to 0.3 of the area": {"crop": 0.3},
    "rotation, up to 15 degrees": {"rotation": 15},
    "flip, half the images": {"flip": 0.5},
}
COPIES = 4  # of each prompt, beside itself: an epoch draws one
PROMPTS = {"synonyms, a fifth of the words": (0.2, 0.0), "words shuffled, half the copies": (0.0, 0.5)}


def targets_of(rows: TrainRows, params: Params, chances: tuple[float, float]) -> np.ndarray:
    """Targets (1 + COPIES, n, 384) with those of augmented prompts, by the chances to replace a word and to shuffle."""
    prompts = read_rows(Path("outputs/prepare/train.parquet"), ["prompt"]).prompt
    section, encode = params.embed_prompts, Encoder(params.embed_prompts.model, device())
    synonyms, found = thesaurus(section.thesaurus), [rows.targets[0]]
    for copy in range(COPIES):
        rng = np.random.default_rng(copy)
        found.append(encode([augment_prompt(prompt, rng, synonyms, *chances) for prompt in prompts]))
    return np.stack(found)


def measure(held_out: int, seeds: list[int]) -> list[list[str]]:
    """A row of cells a variant, of the run here: score, gain with interval, lowest seed, time over that without."""
    params = load_params()
    split = InnerSplit.read(params.model_a.model_copy(update={"augmentation": NONE}), params.folds.ids, held_out)
    plain = split.rows.targets[:1]
    everything = Augmentation(**{key: value for one in IMAGES.values() for key, value in one.items()})
    variants = {"none": (NONE, (0.0, 0.0))}
    variants |= {name: (NONE.model_copy(update=one), (0.0, 0.0)) for name, one in IMAGES.items()}
    variants |= {name: (NONE, chances) for name, chances in PROMPTS.items()}
    variants["all"] = everything, tuple(map(max, zip(*PROMPTS.values(), strict=True)))
    first, cells = None, []
    for name, (amount, chances) in variants.items():
        targets = targets_of(split.rows, params, chances) if any(chances) else plain
        trained = [split.train("model_a", seed, amount, targets) for seed in seeds]
        found, seconds = [cosine(one, split.targets) for one, _ in trained], sum(took for _, took in trained)
        scores = np.array(found)  # (seeds, images)
        first = (scores, seconds) if first is None else first
        gain = scores - first[0]
        low, high = bootstrap_interval(gain.mean(axis=0), split.group)
        gains = f"{gain.mean():+.4f} [{low:+.4f}, {high:+.4f}]" if amount.on or any(chances) else ""
        lowest = f"{gain.mean(axis=1).min():+.4f}" if gains else ""
        cells.append([name, f"{scores.mean():.4f}", gains, lowest, f"{seconds / first[1]:.1f}"])
        print(f"{', '.join(cells[-1])}, {seconds / len(seeds):.0f} s", flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--fold", type=int, default=0, help="the fold that is held out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    cells = [["set", "augmentation", "Model A", "gain [95%]", "lowest seed", "time"], ["---"] * 6]
    for name, _, folder in (one.partition("=") for one in asked.sets):
        with contextlib.chdir(folder):  # images are named from there, and params.yaml may be another
            cells += [[name, *line] for line in measure(asked.fold, asked.seeds)]
    print(f"{markdown(cells)}\n{caption(f'{len(asked.seeds)} seeds, an inner split of fold {asked.fold}', [made()])}")


if __name__ == "__main__":
    main()
