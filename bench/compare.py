"""How often `compare` finds a difference that is none, and how often one that is there, on simulated experiments.

    python bench/compare.py --pairs 200

A simulated competition has pictures of their own difficulty, in groups of similar prompts of unequal size, in five
folds. An idea changes the cosines of a group; a run of it trains for each fold, with a level of its own (`training` is
its deviation), and errs on each picture in a way of its own. Of two ideas that are equal on the mean, every verdict but
`within noise` is false: at most 5% should be, also where any of three experiments counts. With one run a side the
training's level is taken for a difference, as a comparison's notes say. Found: of ideas that gain so much on the mean,
the share with the verdict `better`.
"""

import argparse

import numpy as np
import pandas as pd

from img2prompt.report.comparison import Pairs, differences

FOLDS, PICTURE, IDEA = 5, 0.04, 0.02  # the deviations of a picture's cosine between runs, of a group's between ideas
GAINS = (0.004, 0.008)
SETTINGS = [(0.0, 1, 1), (0.002, 1, 1), (0.002, 2, 2), (0.002, 3, 1), (0.002, 3, 3), (0.006, 3, 3)]


class Competition:
    """Simulated runs on the same pictures."""

    def __init__(self, rng: np.random.Generator, pictures: int, training: float) -> None:
        self._rng, self._training = rng, training
        # Sizes of groups as on the sample: most are of one picture, some of many.
        group = np.repeat(np.arange(pictures), np.minimum(rng.zipf(2.5, pictures), pictures // 40))[:pictures]
        self._rows = pd.DataFrame({"split": "train", "source": "s", "id": np.arange(pictures).astype(str)})
        self._rows = self._rows.assign(fold=group % FOLDS, group=group)
        self._difficulty = rng.normal(0.5, 0.15, pictures)

    def cosines(self, seeds: int, gain: float = 0.0) -> np.ndarray:
        """Those of an idea that gains so much on the mean, run with some seeds: (pictures, seeds)."""
        group, fold = self._rows.group.to_numpy(), self._rows.fold.to_numpy()
        true = self._difficulty + gain + IDEA * self._rng.standard_normal(group.max() + 1)[group]
        levels = self._training * self._rng.standard_normal((FOLDS, seeds))[fold]
        return true[:, None] + levels + PICTURE * self._rng.standard_normal((len(group), seeds))

    def verdict(self, base: np.ndarray, other: np.ndarray, experiments: int = 1) -> str:
        """What is said of one idea against another, where so many are compared."""
        return differences(Pairs(self._rows, {"a": base}, {"a": other}), 1 - 0.05 / experiments).verdict[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=2000)
    args = parser.parse_args()
    titles = ["false", "any of 3 false", *(f"{gain:+g} found" for gain in GAINS)]
    print(f"{args.pairs} pairs, {args.pictures} pictures")
    print(f"{'training':10}{'seeds':>8}", *(f"{title:>15}" for title in titles))
    for training, seeds, others in SETTINGS:
        rng, counts = np.random.default_rng(0), np.zeros(len(titles))
        for _ in range(args.pairs):
            competition = Competition(rng, args.pictures, training)
            base = competition.cosines(seeds)
            equal = [competition.cosines(others) for _ in range(3)]
            counts += [
                competition.verdict(base, equal[0]) != "within noise",
                any(competition.verdict(base, idea, len(equal)) != "within noise" for idea in equal),
                *(competition.verdict(base, competition.cosines(others, gain)) == "better" for gain in GAINS),
            ]
        shares = (f"{share:15.1%}" for share in counts / args.pairs)
        print(f"{training:<10g}{f'{seeds}, {others}':>8}", *shares, flush=True)


if __name__ == "__main__":
    main()
