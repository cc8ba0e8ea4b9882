"""What the report says of a run in tables, charts and numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from img2prompt.clip.params import ClipParams
from img2prompt.core.blocks import Stack
from img2prompt.core.storage import numbered, read_json
from img2prompt.ensemble.members import in_family, kind_of
from img2prompt.model_b.neighbours import nearest
from img2prompt.prompts.dedup import exact_cosines, nearest_below
from img2prompt.prompts.params import DedupParams
from img2prompt.report.charts import Chart, Line, chart
from img2prompt.report.page import Cell, Table, cell, listed, mean_cell, picture
from img2prompt.report.run import Run
from img2prompt.report.scores import choices_table, fold_scores

FEW = 30  # rows that a mean should be of: a bin of prompts has so many, where there are enough
BINS, CLUSTERS = 6, 12  # at most
PAIRS = 20  # of prompts, the nearest to the dedup threshold
LINES = 200  # of the quarantine
EPOCHS = 20  # of which a history has a dot each
ROWS = 2000  # whose nearest prompts are looked for at most; clusters are made of ten times as many


def clips(run: Run, section: ClipParams) -> list[dict[str, object]]:
    """Name, tag of the weights, image size in pixels, and width of the embeddings of every CLIP."""
    found = []
    for folder, (name, tag, _) in zip(numbered(run.outputs / "clip"), section.models, strict=True):
        config = read_json(folder / "open_clip_config.json")["model_cfg"]
        found.append({"name": name, "tag": tag, "size": config["vision_cfg"]["image_size"], "dim": config["embed_dim"]})
    return found


def scores(run: Run) -> dict[str, object]:
    """The scores of every model by fold, out of fold and on test, with intervals, also against the constant."""
    places = {"out of fold": run.oof} | ({"on test": run.on_test} if len(run.on_test) else {})
    means = {place: [mean_cell(table[model], table.group) for model in run.models] for place, table in places.items()}
    gains = {
        place: [mean_cell(table[model] - table.constant, table.group, "+") for model in run.models[1:]]
        for place, table in places.items()
    }
    by_fold = [fold_scores(run.oof[model].to_numpy(float), run.oof.fold.to_numpy()) for model in run.models]
    of_folds = pd.DataFrame(by_fold).drop(columns="oof").rename(columns=lambda key: key.replace("_", " "))
    frame = pd.DataFrame({"model": run.models} | of_folds.to_dict("list"))
    for place in places:
        frame[f"{place} [95%]"] = means[place]
        frame[f"over constant, {place} [95%]"] = [Cell(""), *gains[place]]
    lines = []
    for (place, found), style, shift in zip(means.items(), ("main", "second"), (-0.15, 0.2), strict=False):
        low, high = np.array([one.ends for one in found]).T
        y = np.arange(len(found)) + shift
        lines.append(Line(place, [one.number for one in found], y, style, low, high, joined=False))
    best = max(run.models[1:-1], key=lambda model: run.oof[model].mean())
    about = (
        f"Out of fold the ensemble has {run.oof.ensemble.mean():.4f}, its best member {best} "
        f"{run.oof[best].mean():.4f} and the constant {run.oof.constant.mean():.4f}."
    )
    return {
        "table": Table.of("Mean cosine of every model", frame),
        "chart": chart("Scores", about, "mean cosine, with its 95% interval", "", lines, y_names=run.models),
        "headline": {place: (means[place][-1], gains[place][-1]) for place in places},
        "below": (run.outputs / "scores/scores.md").read_text(encoding="utf-8").rpartition("|\n")[2].strip(),
    }


def mixture(run: Run) -> dict[str, object]:
    """The members' weights, and the curve of alpha with the points that were chosen on it."""
    curve, weights = pd.read_csv(run.outputs / "ensemble/alpha.csv"), run.weights
    family = in_family(weights.index)
    folds = [column for column in weights.columns if column.startswith("fold_")]
    shares = weights[family].sum()
    lines = [
        Line(fold.replace("_", " "), curve.alpha, curve[fold], "faint", dots=False, legend="each fold")
        for fold in folds
    ]
    lines.append(Line("all folds", curve.alpha, curve.score, "main", dots=False))
    on_curve = [np.interp(shares[fold], curve.alpha, curve[fold]) for fold in folds]
    lines.append(Line("each fold, at the share that the others chose", shares[folds], on_curve, "second", joined=False))
    best = curve.score.max()
    lines.append(Line("best share out of fold", [shares.weight_oof], [best], "best", joined=False))
    about = (
        f"Model B alone has {curve.score.iloc[0]:.4f}, Model A's family alone {curve.score.iloc[-1]:.4f}; "
        f"the best mix out of fold is {best:.4f} at {shares.weight_oof:.3f}. In use is {shares.weight:.3f}."
    )
    names = {"weight": "in use", "weight_oof": "best out of fold"} | {
        fold: f"for {fold.replace('_', ' ')}" for fold in folds
    }
    return {
        "table": Table.of("Weights of the members", weights.rename(columns=names).reset_index()),
        "chart": chart(
            "The share of Model A's family, alpha", about, "alpha", "mean cosine", lines, {"in use": shares.weight}
        ),
    }


def training(run: Run) -> dict[str, object]:
    """The heads' histories on the validation rows, a chart for each head of each CLIP, and what these rows chose."""
    folds, charts, untrained = np.unique(run.fold).tolist(), [], []
    for model in run.models:
        kind, clip = kind_of(model)
        if kind not in ("linear", "model_a"):
            continue
        histories = {
            f"fold {held_out}": pd.read_csv(run.outputs / f"model_a/fold_{held_out}/{clip}/{kind}_history.csv")
            for held_out in folds
        }
        histories = {name: table for name, table in histories.items() if table.score.notna().any()}
        if not histories:
            untrained.append(model)
            continue
        mean = pd.concat([table.set_index("epoch").score for table in histories.values()], axis=1).mean(axis=1)
        dots = len(mean) <= EPOCHS
        lines = [
            Line(name, found.epoch, found.score, "faint", dots=dots, legend="each fold")
            for name, found in histories.items()
        ]
        lines.append(Line("mean of the folds", mean.index, mean, "main", dots=dots))
        about = f"From {mean.iloc[0]:.4f} after the first epoch to {mean.iloc[-1]:.4f} after the last."
        charts.append(chart(f"{model}, validation rows", about, "epoch", "mean cosine", lines))
    choices = choices_table(run.outputs / "model_a", folds).rename(columns=lambda name: name.replace("_", " "))
    return {
        "charts": charts,
        "table": Table.of("What the validation rows chose", choices),
        "untrained": listed(untrained) if untrained else "",
    }


def thresholds(run: Run, threshold: float) -> dict[str, object]:
    """How many prompts each threshold keeps."""
    table = pd.read_csv(run.outputs / "dedup/thresholds.csv")
    about = f"Of {len(run.train):,} prompts {int(run.kept.sum()):,} are trained on."
    line = Line("share kept", table.threshold, table["share"], "main")
    label = "cosine above which one of two prompts is dropped"
    return {
        "table": Table.of(
            "Prompts kept by threshold",
            table.assign(threshold=[f"{level:g}{', in use' * (level == threshold)}" for level in table.threshold]),
        ),
        "chart": chart("What a threshold keeps", about, label, "share kept", [line], {"in use": threshold}),
    }


def pairs(run: Run, dedup: DedupParams, device: str) -> list[dict[str, object]]:
    """The PAIRS pairs of train prompts whose cosine is nearest to the threshold, the largest first.

    Of each its `cosine`, whether one was `dropped` for the other, and both `sides`, each with its `id`, `prompt`,
    `picture` and whether it was `dropped`. No pairs where rows are dropped at random, so that no cosine decides.
    """
    if dedup.at_random:
        return []
    stands_for = np.load(run.outputs / "dedup/stands_for.npy")
    dropped = np.flatnonzero((stands_for >= 0) & (stands_for != np.arange(len(stands_for))))
    kept = np.flatnonzero(run.kept)
    i, j, below = nearest_below(np.asarray(run.targets[kept]), dedup.threshold, PAIRS, device)
    above = exact_cosines(run.targets, dropped, run.targets, stands_for[dropped])
    cosine = np.concatenate([above, below])
    first, second = np.concatenate([dropped, kept[i]]), np.concatenate([stands_for[dropped], kept[j]])
    near = np.argsort(np.abs(cosine - dedup.threshold), kind="stable")[:PAIRS]
    return [
        {
            "dropped": bool(number < len(dropped)),
            "cosine": float(cosine[number]),
            "sides": [
                {"id": row.id, "prompt": row.prompt, "picture": picture(row.image), "dropped": not run.kept[place]}
                for place in (first[number], second[number])
                for row in [run.train.iloc[place]]
            ],
        }
        for number in near[np.argsort(-cosine[near], kind="stable")]
    ]


def leakage(run: Run) -> dict[str, float | None]:
    """How near prompts of other folds, and of training and test, are to one another; None where it is unknown."""
    found = run.scores["folds"] | dict.fromkeys(("near", "near_pair", "max_train_cosine"))
    renamed = {"near_a_train": "near", "near_a_clip_pair": "near_pair"}
    return found | {renamed.get(key, key): value for key, value in run.scores["test"].items()}


def folds(run: Run) -> Table:
    """The rows, scored rows and groups of every fold."""
    table = pd.DataFrame({"fold": run.fold, "group": run.group, "scored": run.scored})
    found = table.groupby("fold").agg(rows=("scored", "size"), scored=("scored", "sum"), groups=("group", "nunique"))
    largest = table.groupby(["fold", "group"]).size().groupby("fold").max()
    return Table.of("Rows of each fold", found.assign(**{"largest group": largest}).reset_index())


def by_nearness(run: Run, device: str) -> Chart:
    """The ensemble's score by the cosine of a picture's prompt with the nearest one that its models were trained on."""
    rows, parts = _some(run.oof, ROWS), []
    for held_out, of_fold in rows.groupby("fold"):
        others = np.flatnonzero(run.kept & (run.fold != held_out))
        parts.append(
            _nearest_cosine(run.targets[of_fold.index.to_numpy()], Stack([run.targets], others), of_fold, device)
        )
    places = {"out of fold": pd.concat(parts)}
    if len(run.on_test):
        trained = Stack([run.targets], np.flatnonzero(run.kept))
        places["on test"] = _nearest_cosine(run.test_targets, trained, run.on_test, device)
    edges = np.array([-1, *np.arange(0.3, 1, 0.1), 1.01])
    names = ["<.3", *(f".{low}–.{low + 1}" for low in range(3, 9)), ">.9"]
    used = sorted({int(number) for table in places.values() for number in np.digitize(table.near, edges) - 1})
    lines = []
    for (place, table), style in zip(places.items(), ("main", "second"), strict=False):
        number = np.digitize(table.near, edges) - 1
        found = [used.index(own) for own in used if (number == own).any()]
        lines.append(_means(place, [table[number == used[own]] for own in found], "ensemble", style, found))
    return chart(
        "Score by the nearest prompt in training",
        "Where training saw prompts much like a picture's own, its score says less about new ones. "
        + " ".join(
            f"{place.capitalize()} half of the prompts have one at {t.near.median():.2f}."
            for place, t in places.items()
        ),
        "cosine with the nearest prompt in training",
        "mean cosine",
        lines,
        x_names=[names[number] for number in used],
    )


def _some(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """At most n rows of a table, evenly spaced."""
    return table.iloc[np.unique(np.linspace(0, len(table) - 1, n).astype(int))]


def _nearest_cosine(queries: np.ndarray, keys: Stack, table: pd.DataFrame, device: str) -> pd.DataFrame:
    distance = nearest(queries, keys, 1, device).distance[:, 0].astype(float)
    return table.assign(near=1 - distance**2 / 2)


def _means(name: str, parts: Sequence[pd.DataFrame], model: str, style: str, places: Sequence[int]) -> Line:
    """A line of a model's mean cosines over tables of scored rows, with their intervals."""
    found = [mean_cell(part[model], part.group) for part in parts]
    low, high = np.array([one.ends for one in found]).T
    return Line(name, places, [one.number for one in found], style, low, high)


def quarantine(run: Run) -> dict[str, object]:
    """What was set aside: how much by reason, and the first LINES rows."""
    files = [run.outputs / stage / "quarantine.csv" for stage in ("prepare", "prepare_test")]
    table = pd.concat([pd.read_csv(file, dtype=str, keep_default_na=False) for file in files], ignore_index=True)
    counts = table.groupby(["split", "source", "reason"]).size().rename("rows").reset_index()
    return {
        "count": len(table),
        "counts": Table.of("Rows set aside by reason", counts),
        "table": Table.of("Rows set aside", table[:LINES], filtered=True),
        "shown": min(len(table), LINES),
    }


def by_length(run: Run) -> dict[str, object]:
    """The scores out of fold by the number of words in the prompt."""
    words = run.oof.prompt.str.split().str.len()
    ends = np.linspace(0, 1, int(np.clip(len(words) // FEW, 1, BINS)) + 1)[1:-1]
    number = np.searchsorted(np.unique(np.quantile(words, ends).astype(int)), words, side="right")
    parts = [run.oof[number == own] for own in np.unique(number)]
    counts = [words[part.index] for part in parts]
    names = [f"{low}" if low == high else f"{low}–{high}" for low, high in ((n.min(), n.max()) for n in counts)]
    models = ["constant", *run.leaders, "ensemble"]
    rows = [
        [Cell(name, int(count.min())), cell(len(part)), *(mean_cell(part[m], part.group) for m in models)]
        for name, part, count in zip(names, parts, counts, strict=True)
    ]
    places = range(len(parts))
    styles = {"constant": "faint", models[2]: "second", "ensemble": "main"}
    lines = [_means(model, parts, model, style, places) for model, style in styles.items()]
    first, last = (row[-1].number for row in (rows[0], rows[-1]))
    about = f"The ensemble has {first:.4f} at {names[0]} words and {last:.4f} at {names[-1]}."
    return {
        "table": Table("Scores by the number of words", ["words", "pictures", *(f"{m} [95%]" for m in models)], rows),
        "chart": chart("Score by length of prompt", about, "words in the prompt", "mean cosine", lines, x_names=names),
    }


def by_cluster(run: Run) -> Table | None:
    """The scores out of fold by cluster of prompts, named by its typical words, the lowest first; None for few rows.

    Clusters are scikit-learn's k-means of the targets. A word is typical by how much more its mean TF-IDF is in the
    cluster than over all prompts.
    """
    if len(run.oof) < 2 * FEW:
        return None
    rows = _some(run.oof, 10 * ROWS)
    targets = run.targets[rows.index.to_numpy()]
    means = KMeans(int(np.clip(len(targets) // (2 * FEW), 2, CLUSTERS)), n_init=4, random_state=0)
    with threadpool_limits(1):  # the order in which threads add up would show in the last digits
        cluster = means.fit_predict(targets)
    vectorizer = TfidfVectorizer(stop_words="english")
    try:
        words = vectorizer.fit_transform(rows.prompt)
        names = vectorizer.get_feature_names_out()
    except ValueError:  # no prompt has a word but stop words
        words, names = np.zeros((len(rows), 0)), np.empty(0, str)
    overall, found = np.asarray(words.mean(axis=0)).ravel(), []
    models = [*run.leaders, "ensemble"]
    for number in np.unique(cluster):
        own = rows[cluster == number]
        more = np.asarray(words[cluster == number].mean(axis=0)).ravel() - overall
        typical = [str(names[place]) for place in np.argsort(-more, kind="stable")[:4] if more[place] > 0]
        example = own.prompt.iloc[int(np.argmax(targets[cluster == number] @ means.cluster_centers_[number]))]
        scores = [mean_cell(own[model], own.group) for model in models]
        gain = mean_cell(own.ensemble - own.constant, own.group, "+")
        name = ", ".join(typical) or "no word but stop words"
        found.append([Cell(name), cell(len(own)), *scores, gain, Cell(example)])
    found.sort(key=lambda row: row[4].number)
    columns = ["typical words", "pictures", *(f"{model} [95%]" for model in models), "ensemble over constant [95%]"]
    return Table("Scores by cluster of prompts", [*columns, "the prompt in its middle"], found)
