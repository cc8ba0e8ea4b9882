"""Words of the last run's test pictures against their prompts: composed and nearest prompts, words, and examples.

    python bench/words.py                   # the test pictures whose prompts are known
    python bench/words.py --fold 0          # a fold's pictures, out of fold, in the words of the other folds' prompts

Reads outputs/. Intervals are 95%, over groups of similar prompts. Choices for the contest are made with --fold. --docs
puts the figures of all test pictures into docs/results.md.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.cli.check import load_params
from img2prompt.cli.documents import caption, put
from img2prompt.core.device import device
from img2prompt.core.metric import bootstrap_interval, cosine
from img2prompt.core.process import made
from img2prompt.core.rows import read_rows
from img2prompt.ensemble.members import read_oof
from img2prompt.ensemble.mixture import Mixture
from img2prompt.prompts.encoder import Encoder
from img2prompt.report.run import data_of
from img2prompt.report.scores import markdown
from img2prompt.words.fit import which
from img2prompt.words.phrases import Phrases, mine
from img2prompt.words.vocabulary import Vocabulary
from img2prompt.words.words import Words

OUTPUTS = Path("outputs")
TITLES = [
    "pictures",
    "ensemble",
    "nearest prompt",
    "composed prompt",
    "composed minus nearest",
    "first five words right",
]


class Counted(Encoder):
    """An encoder that counts what it embeds."""

    embedded = 0

    def __call__(self, texts: list[str], **options: object) -> np.ndarray:
        """As `Encoder` does."""
        self.embedded += len(set(texts))
        return super().__call__(texts, **options)


def test_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the test pictures with a known prompt: predictions and targets (m, 384), prompts, groups (m,)."""
    rows, cosines = (
        read_rows(OUTPUTS / "prepare_test/test.parquet"),
        pd.read_parquet(OUTPUTS / "scores/cosines.parquet"),
    )
    known, group = rows.prompt.notna().to_numpy(), cosines.group[cosines.split == "test"].to_numpy()
    targets = np.load(OUTPUTS / "prepare_test/targets.npy")
    return np.load(OUTPUTS / "scores/test.npy")[known], targets, rows.prompt[known].to_numpy(), group


def fold_rows(held_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same of the scored pictures of a fold, out of fold."""
    rows, folds = read_rows(OUTPUTS / "prepare/train.parquet"), pd.read_parquet(OUTPUTS / "folds/folds.parquet")
    fold, mixture = folds.fold.to_numpy(), Mixture.load(OUTPUTS / "ensemble")
    own = np.load(OUTPUTS / "dedup/scored.npy") & (fold == held_out)
    models = read_oof(OUTPUTS, fold)
    predictions = mixture({name: models[name][own] for name in mixture.weights}, np.ones(own.sum(), dtype=bool))
    targets = np.load(OUTPUTS / "embed_prompts/train.npy")[own]
    return predictions, targets, rows.prompt[own].to_numpy(), folds.group[own].to_numpy()


def words_without(held_out: int | None, encode: Encoder) -> Words:
    """The run's words; without the prompts of a fold and the texts near it, where one is held out."""
    fold = pd.read_parquet(OUTPUTS / "folds/folds.parquet").fold.to_numpy()
    near = np.load(OUTPUTS / "folds/texts_near.npy").T
    near = near[np.unique(fold) == held_out].any(axis=0)
    prompts, targets = [], []
    for name, out in (("train", fold == held_out), ("texts", near)):
        prompts.append(read_rows(OUTPUTS / f"prepare/{name}.parquet", ["prompt"]).prompt[~out])
        targets.append(np.load(OUTPUTS / f"embed_prompts/{name}.npy")[~out])
    code, distinct = pd.factorize(pd.concat(prompts))
    stored = Phrases.load(OUTPUTS / "words")
    place = {phrase: i for i, phrase in enumerate(stored.phrases)}
    phrases, counts = zip(*(both for both in mine(distinct) if both[0] in place), strict=True)
    phrases = Phrases(phrases, counts, stored.embeddings[[place[phrase] for phrase in phrases]])
    first = np.unique(code, return_index=True)[1]
    return Words(distinct, np.concatenate(targets)[first], phrases, Vocabulary.load(OUTPUTS / "words"), encode)


def with_interval(values: np.ndarray, groups: np.ndarray) -> str:
    low, high = bootstrap_interval(values, groups)
    return f"{values.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def reliability(probabilities: np.ndarray, said: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Of (n,) words, in bins of equal size by probability: number, mean probability, share that is right."""
    parts = np.array_split(np.argsort(probabilities, kind="stable"), bins)
    rows = [(len(part), probabilities[part].mean(), said[part].mean()) for part in parts if len(part)]
    return pd.DataFrame(rows, columns=["words", "probability", "right"])


def calibration_error(table: pd.DataFrame) -> float:
    """The expected calibration error: the mean over words of what their bin's probability is off by."""
    return float((table.words * (table.probability - table.right).abs()).sum() / table.words.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold", type=int)
    parser.add_argument("--pictures", type=int, help="as many, evenly spaced (default: all)")
    parser.add_argument("--examples", type=int, default=12)
    parser.add_argument("--docs", action="store_true")
    args = parser.parse_args()
    if args.docs and (args.fold is not None or args.pictures):
        parser.error("--docs is of all test pictures: leave out --fold and --pictures")
    encode = Counted(load_params().embed_prompts.model, device(), quiet=True)
    predictions, targets, prompts, group = test_rows() if args.fold is None else fold_rows(args.fold)
    some = np.linspace(0, len(targets) - 1, min(len(targets), args.pictures or len(targets))).astype(int)
    predictions, targets, prompts, group = predictions[some], targets[some], prompts[some], group[some]
    words = words_without(args.fold, encode)
    start = time.perf_counter()
    said = words(predictions)
    seconds, embedded = time.perf_counter() - start, encode.embedded
    composed, nearest = encode([one.prompt for one in said]), encode([one.nearest[0][0] for one in said])
    scores = {
        "ensemble": cosine(predictions, targets), "nearest prompt": cosine(nearest, targets),
        "composed prompt": cosine(composed, targets),
    }  # fmt: skip
    print(f"{len(said)} pictures, {seconds / len(said):.3f} s and {embedded / len(said):.0f} embeddings a picture")
    print("cosine to the truth | to the prediction")
    for name, to_truth in scores.items():
        vectors = {"ensemble": predictions, "nearest prompt": nearest, "composed prompt": composed}[name]
        print(f"{name:16} {with_interval(to_truth, group)} | {cosine(vectors, predictions).mean():.4f}")
    gain = with_interval(scores["composed prompt"] - scores["nearest prompt"], group)
    print(f"composed minus nearest {gain}")
    cells = [
        f"{len(said):,}",
        *(f"{to_truth.mean():.4f}" for to_truth in scores.values()),
        gain,
        "none is common enough",
    ]

    vocabulary = Vocabulary.load(OUTPUTS / "words")
    if vocabulary.words and args.fold is None:
        truth = which(prompts, vocabulary.words).toarray().astype(bool)
        probabilities = vocabulary.probabilities(predictions)
        first = np.argsort(-probabilities, axis=1, kind="stable")[:, :5]
        right, sure = (np.take_along_axis(x, first, axis=1) for x in (truth, probabilities))
        best, common = np.minimum(truth.sum(1), first.shape[1]).mean() / first.shape[1], truth[:, :5].mean()
        print(f"\n{len(vocabulary.words)} words; a prompt has {truth.sum(1).mean():.2f} of them")
        cells[-1] = f"{right.mean():.2f}, said {sure.mean():.2f}, possible {best:.2f}"
        print(f"right of the first five: {with_interval(right.mean(1), group)}; mean probability {sure.mean():.4f}")
        print(f"(at best {best:.4f}, the five commonest {common:.4f}); of the first: {right[:, 0].mean():.4f}")
        for name, p, y in (("the first five", sure, right), ("all words", probabilities, truth)):
            table = reliability(p.ravel(), y.ravel())
            print(f"{name}: expected calibration error {calibration_error(table):.4f}")
            print(table.round(4).to_string(index=False))

    order = np.argsort(scores["composed prompt"], kind="stable")
    print("\nexamples, evenly spaced by the composed prompt's cosine to the truth")
    for row in order[np.linspace(0, len(order) - 1, args.examples).astype(int)]:
        own = {name: f"{to_truth[row]:.2f}" for name, to_truth in scores.items()}
        print(f"truth     {prompts[row]}   (ensemble {own['ensemble']})")
        print(f"composed  {said[row].prompt}   ({own['composed prompt']})")
        print(f"nearest   {said[row].nearest[0][0]}   ({own['nearest prompt']})")
        print(f"words     {', '.join(f'{word} {probability:.2f}' for word, probability in said[row].words)}\n")
    if args.docs:
        data = data_of(pd.read_parquet(OUTPUTS / "scores/cosines.parquet"))
        table = markdown([TITLES, ["---"] * len(TITLES), cells])
        put({f"words {data}": f"{table}\n{caption(f'Data: {data}', [made()])}"}, Path(__file__).resolve().parent.parent)


if __name__ == "__main__":
    main()
