import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dvc.repo import Repo
from PIL import Image
from scipy.stats import ttest_1samp, ttest_ind
from test_report import Page

from img2prompt.cli.compare import images
from img2prompt.cli.main import main
from img2prompt.core.metric import bootstrap_interval
from img2prompt.report import compared as page_of
from img2prompt.report.comparison import (
    KEY,
    Side,
    differences,
    fails,
    interval,
    most_changed,
    pair,
    results,
    verdict,
)
from img2prompt.report.figures import draw_results


def cosines(seed=0, n=60, **models):
    """A cosines table of n train rows in folds 0 and 1, groups of two, every fifth not scored, and n // 2 test rows."""
    rng = np.random.default_rng(seed)
    train = pd.DataFrame({"split": "train", "source": "s", "id": [f"p{i}" for i in range(n)], "fold": np.arange(n) % 2})
    train = train.assign(group=np.arange(n) // 2, scored=np.arange(n) % 5 > 0)
    test = train[: n // 2].assign(split="test", fold=-1, group=np.arange(n // 2), scored=True)
    table = pd.concat([train, test], ignore_index=True)
    values = {name: rng.uniform(0.3, 0.7, len(table)) + shift for name, shift in models.items()}
    return table.assign(**values).astype(dict.fromkeys(models, np.float32))


def side(*tables, name="a", **params):
    names = [name] + [f"{name}-s{seed}" for seed in range(1, len(tables))]
    return Side(names, tables, [{"model_a.seed": seed} | params for seed in range(len(tables))])


def test_pairs_are_of_the_images_that_all_runs_have_scored():
    first, second = cosines(ridge=0.0, linear=0.0), cosines(1, ridge=0.1, model_a=0.0)
    second = second.drop(index=[1, 2]).sample(frac=1, random_state=0)
    third = cosines(2, ridge=0.1).drop(index=[3])
    pairs, notes = pair(side(first), side(second, third))
    wanted = first[first.scored].drop(index=[1, 2, 3])
    pd.testing.assert_frame_equal(pairs.rows, wanted[[*KEY, "fold", "group"]].reset_index(drop=True))
    assert list(pairs.base) == list(pairs.other) == ["ridge"]
    assert pairs.base["ridge"].tolist() == wanted[["ridge"]].to_numpy(float).tolist()
    columns = [table.ridge.reindex(wanted.index).to_numpy(float) for table in (second, third)]
    assert pairs.other["ridge"].tolist() == np.column_stack(columns).tolist()
    assert notes == [
        "train images: 46 to 48 scored by a run; compared on the 45 that all runs have",
        "not every run has linear, model_a",
    ]
    assert pair(side(first), side(first))[1] == []


def test_other_folds_are_said_to_be_so():
    first = cosines(ridge=0.0)
    _, notes = pair(side(first), side(first.assign(fold=0)))
    assert notes == ["the folds differ: those of a are shown"]


def test_nothing_in_common_is_refused():
    first = cosines(ridge=0.0)
    for second in (first.assign(source="other"), first.rename(columns={"ridge": "linear"})):
        with pytest.raises(ValueError, match=r"a and b \(2 seeds\) have no scored image, or no model, in common"):
            pair(side(first), side(first, second, name="b"))


def test_the_runs_of_a_side_differ_in_their_seeds_only():
    first, second = cosines(ridge=0.0), cosines(1, ridge=0.0)
    assert side(first, second).notes() == []
    other = Side(["a", "b"], [first, second], [{"knn.k": 5, "folds.seed": 0}, {"knn.k": 6, "folds.seed": 1}])
    assert other.notes() == ["a and b differ in knn.k, not only in seeds"]
    assert Side(["a", "b"], [first, second], [{}, {}]).notes() == ["a and b differ in no param, so not in seeds"]
    assert (other.name, other.value("knn.k"), other.value("x.y")) == ("a (2 seeds)", "5, 6", "not there")
    with pytest.raises(ValueError, match="a and a-s2 have the same cosines in every row"):
        side(first, second, first.copy()).notes()


def test_an_interval_of_one_seed_each_is_over_groups():
    rng = np.random.default_rng(0)
    base, other = rng.normal(0.5, 0.1, (200, 1)), rng.normal(0.51, 0.1, (200, 1))
    gain = (other - base)[:, 0]
    for level in (0.95, 0.99):
        alone = ttest_1samp(gain, 0).confidence_interval(level)
        assert interval(base, other, np.arange(200), level) == pytest.approx(tuple(alone))
    twice = [np.repeat(values, 2, axis=0) for values in (base, other)]
    assert interval(*twice, np.repeat(np.arange(200), 2)) == pytest.approx(interval(base, other, np.arange(200)))
    groups = rng.integers(0, 100, 200)
    low, high = bootstrap_interval(gain, groups)
    found = interval(base, other, groups)
    assert found == pytest.approx((low, high), abs=0.1 * (high - low))
    assert np.isnan(interval(base, other, np.zeros(200))).all()


def test_an_interval_of_runs_that_differ_in_nothing_but_their_level_is_welch_s():
    base, other = np.array([[0.50, 0.52, 0.49]]), np.array([[0.55, 0.51]])
    rows = [np.repeat(values, 10, axis=0) for values in (base, other)]
    welch = ttest_ind(other[0], base[0], equal_var=False).confidence_interval()
    assert interval(*rows, np.arange(10)) == pytest.approx(tuple(welch))
    # A side of one seed is taken to vary as the other does.
    low, high = interval(rows[0], rows[1][:, :1], np.arange(10))
    width = 4.302653 * np.std(base[0], ddof=1) * np.sqrt(1 / 3 + 1)
    assert (low, high) == pytest.approx((0.55 - base.mean() - width, 0.55 - base.mean() + width))
    assert interval(rows[0][:, :1], rows[0][:, :1] + 0.5, np.arange(10)) == pytest.approx((0.5, 0.5))


def simulated(rng, seeds, effect, training):
    """The cosines (400, seeds) of two sides of one difficulty: pictures in pairs, five folds that are trained apart."""
    group, fold = np.arange(400) // 2, np.arange(400) % 5

    def side(gain):
        runs = training * rng.standard_normal((5, seeds))[fold] + rng.normal(0, 0.04, (400, seeds))
        return difficulty[:, None] + gain[:, None] + runs

    difficulty = rng.normal(0.5, 0.15, 400)
    return side(np.zeros(400)), side(rng.normal(effect, 0.02, 200)[group]), group


@pytest.mark.parametrize(
    ("seeds", "training", "fewest", "most"),
    [(1, 0.0, 0, 15), (3, 0.0, 0, 15), (3, 0.01, 0, 15), (1, 0.01, 40, 200)],
    ids=["one run", "seeds without noise", "seeds with noise", "one run cannot know of noise"],
)
def test_of_200_pairs_without_a_difference_few_are_said_to_have_one(seeds, training, fewest, most):
    rng = np.random.default_rng(0)
    verdicts = [verdict(*interval(*simulated(rng, seeds, 0.0, training))) for _ in range(200)]
    assert fewest <= 200 - verdicts.count("within noise") <= most


@pytest.mark.parametrize(("seeds", "training"), [(1, 0.0), (3, 0.01)])
def test_of_200_pairs_with_a_difference_most_are_found(seeds, training):
    rng = np.random.default_rng(0)
    for effect, word in ((0.025, "better"), (-0.025, "worse")):
        verdicts = [verdict(*interval(*simulated(rng, seeds, effect, training))) for _ in range(100)]
        assert verdicts.count(word) >= 80


def test_differences_by_place():
    first, second = cosines(linear=0.0, ridge=0.0), cosines(1, linear=0.0, ridge=0.1)
    pairs, _ = pair(side(first), side(second))
    table = differences(pairs, 0.99).set_index(["model", "on"])
    assert table.index.tolist() == [(m, on) for m in ("linear", "ridge") for on in ("oof", "fold_0", "fold_1", "test")]
    rows = (first.scored & (first.fold == 1)).to_numpy()
    base, other = (table.ridge[rows].to_numpy(float)[:, None] for table in (first, second))
    found = table.loc["ridge", "fold_1"]
    assert found.images == rows.sum()
    assert (found.base, found.score) == pytest.approx((base.mean(), other.mean()))
    assert found.difference == pytest.approx(other.mean() - base.mean())
    assert (found.low, found.high) == pytest.approx(interval(base, other, first.group[rows], 0.99))
    assert found.verdict == "within noise"
    pairs, _ = pair(side(first), side(second[second.split == "test"]))
    assert differences(pairs).on.tolist() == ["test", "test"]


WORDS = [
    ((0.003, 0.004), "better", "better by at least 0.002"),
    ((0.001, 0.004), "better", "better, perhaps by less than 0.002"),
    ((0.001, 0.0015), "better", "no difference that matters"),
    ((-0.001, 0.0015), "within noise", "no difference that matters"),
    ((-0.001, 0.003), "within noise", "within noise"),
    ((-0.0015, -0.001), "worse", "no difference that matters"),
    ((-0.004, -0.001), "worse", "worse, perhaps by less than 0.002"),
    ((-0.004, -0.003), "worse", "worse by at least 0.002"),
    ((0.0, 0.0), "the same", "the same"),
    ((np.nan, np.nan), "unknown", "unknown"),
]


def test_verdicts_and_the_gate():
    for ends, plain, with_least in WORDS:
        assert (verdict(*ends), verdict(*ends, at_least=0.002)) == (plain, with_least)
        for word, least in ((plain, 0.0), (with_least, 0.002)):
            assert fails(*ends, "worse", least) == word.startswith("worse")
            assert fails(*ends, "not-better", least) == (word not in ("better", "better by at least 0.002"))


def test_most_changed():
    first = cosines(ridge=0.0)
    second = first.copy()
    second["ridge"] += pd.Series({2: 0.1, 7: 0.3, 61: 0.2, 3: -0.1, 4: -0.2}).reindex(first.index, fill_value=0)
    better, worse = most_changed(pair(side(first), side(second))[0], "ridge", 2)
    assert better[["split", "id"]].values.tolist() == [["train", "p7"], ["test", "p1"]]
    assert (better.score - better.base).tolist() == pytest.approx([0.3, 0.2])
    assert worse.id.tolist() == ["p4", "p3"]
    better, worse = most_changed(pair(side(first), side(second))[0], "ridge", 9)
    assert (len(better), len(worse)) == (3, 2)


def row(table, model):
    return table[table.scored].assign(cosine=table[model].astype(float))


def test_results_by_hand(tmp_path):
    table = cosines(linear=0.0, ridge=0.0, model_a=0.1)
    found = results({name: row(table, name) for name in ("linear", "ridge", "model_a")})
    assert found.row.tolist() == ["linear", "ridge", "model_a"]
    scored = table[table.scored]
    train, test = scored[scored.split == "train"], scored[scored.split == "test"]
    line = found.loc[2]
    assert line.oof == pytest.approx(train.model_a.astype(float).mean())
    assert line.test == pytest.approx(test.model_a.astype(float).mean())
    assert line.oof_std == pytest.approx(np.std(train.groupby("fold").model_a.mean()), abs=1e-6)
    for kind, rows, other in (
        ("vs_above", train, "ridge"),
        ("vs_first", train, "linear"),
        ("test_vs_first", test, "linear"),
    ):
        gain = rows.model_a.astype(float) - rows[other].astype(float)
        assert line[kind] == pytest.approx(gain.mean())
        assert (line[f"{kind}_low"], line[f"{kind}_high"]) == pytest.approx(bootstrap_interval(gain, rows.group))
    assert found.loc[0, "vs_above":].isna().all()

    without = results({name: row(table[table.split == "train"], name) for name in ("linear", "model_a")})
    assert without.test.isna().all()
    assert without.vs_first[1] == pytest.approx(line.vs_first)
    for number, shown in enumerate((found, without)):
        draw_results(tmp_path / f"{number}.png", shown, ours=1)
        assert Image.open(tmp_path / f"{number}.png").size[0] == 1100


def test_results_on_other_images_are_refused():
    table = cosines(linear=0.0)
    first = row(table, "linear")
    results({"a": first, "b": first.sample(frac=1, random_state=0)})
    for other in (first[1:], first.assign(fold=0), first.assign(id="x")):
        with pytest.raises(ValueError, match="b is scored on other images or folds than a"):
            results({"a": first, "b": other})


def test_the_page_has_the_numbers_of_the_table(compared):
    page = Page((compared / "outputs/compare/index.html").read_text())
    table = pd.read_csv(compared / "outputs/compare/compare.csv")
    assert list(dict.fromkeys(table.experiment)) == ["idea (2 seeds)", "a<b>"]
    rows = page.tables["Every model against the base"][1:]
    assert [row[:2] for row in rows[:2]] == [["idea (2 seeds)", "ensemble"], ["a<b>", "ensemble"]]
    for row in rows:
        for place, on in ((2, "oof"), (6, "test")):
            found = table[(table.experiment == row[0]) & (table.model == row[1]) & (table.on == on)].iloc[0]
            ends = f"[{found.low:+.4f}, {found.high:+.4f}]"
            assert row[place] == found.verdict
            assert row[place + 1 : place + 3] == [f"{found.base:.4f}", f"{found.score:.4f}"]
            assert row[place + 3].split(" ", 1) == [f"{found.difference:+.4f}", ends]
    by_fold = page.tables["Differences of ensemble by fold [97.5%]"]
    assert [by_fold[0], [row[0] for row in by_fold[1:]]] == [
        ["experiment", "fold 3", "fold 7"], ["idea (2 seeds)", "a<b>"],
    ]  # fmt: skip
    assert page.tables["Params that differ"] == [
        ["param", "workspace", "idea (2 seeds)", "a<b>"],
        ["knn.k", "search", "5", "search"],
        ["model_a.seed", "0", "0, 1", "0"],
    ]
    for note in ("Intervals are 97.5%, not 95%", "workspace and a<b> are one run each", "one side is one run"):
        assert note in page.text
        assert note in (compared / "outputs/compare/compare.md").read_text()
    images = [tag for tag in page.tags if tag[0] == "img"]
    assert len(images) + page.text.count("This picture cannot be read here.") == 2 * 2 * page_of.SHOWN
    assert all(attributes["src"].startswith("data:image/webp;base64,") for _, attributes in images)


def test_pictures_that_are_not_here_are_said_to_be_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs, _ = pair(side(cosines(ridge=0.0)), side(cosines(1, ridge=0.0)))
    for cards in page_of.cards(pairs, "ridge", images()).values():
        assert [(card.known, card.picture, card.prompt) for card in cards] == [(False, None, None)] * page_of.SHOWN


DVC_YAML = """
stages:
  scores:
    cmd: mkdir -p outputs/scores && cp ${cosines}${model_a.seed}.parquet outputs/scores/cosines.parquet
    params: [cosines, model_a]
    outs: [outputs/scores/]
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a run at HEAD, experiments `s1`, `more` and `more-s1`, and the last one as its workspace."""
    monkeypatch.chdir(tmp_path)
    for who in ("AUTHOR", "COMMITTER"):
        for what in ("NAME", "EMAIL"):
            monkeypatch.setenv(f"GIT_{who}_{what}", "x@y")
    table, rng = cosines(ensemble=0.0, ridge=0.0), np.random.default_rng(0)
    for name, gain in (("first", 0.0), ("second", 0.1)):
        for seed in (0, 1):
            noise = rng.normal(0, 0.01, len(table)) + rng.normal(0, 0.001)
            table.assign(ensemble=table.ensemble + noise + gain).to_parquet(f"{name}{seed}.parquet")
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("params.yaml").write_text("cosines: first\nmodel_a: {seed: 0}\n")
    Path(".gitignore").write_text("/outputs/\n")
    subprocess.run(["git", "init", "-q"], check=True)
    with Repo.init() as repo:
        repo.reproduce()
        subprocess.run("git add . && git commit -qm first", shell=True, check=True)
        for name, params in (("s1", []), ("more", ["cosines=second"]), ("more-s1", ["cosines=second"])):
            repo.experiments.run(name=name, params=[*params, f"model_a.seed={int(name.endswith('s1'))}"])


def status(*arguments):
    """Of `img2prompt compare`: its exit status, and what it says in the end."""
    try:
        main(["compare", *arguments])
    except SystemExit as end:
        return (1, end.code) if isinstance(end.code, str) else (end.code, "")
    return 0, ""


def test_experiments_and_revisions_are_read_from_dvc(repository, capsys):
    assert status() == (0, "")
    out = capsys.readouterr().out
    assert out.startswith(
        "The base is HEAD.\n\n| param | HEAD | workspace |\n| --- | --- | --- |\n| cosines | first | second |"
    )
    assert "one run each" in out
    found = pd.read_csv("outputs/compare/compare.csv").set_index(["model", "on"])
    assert found.loc["ensemble", "oof"].difference == pytest.approx(0.1, abs=0.01)
    assert found.verdict.to_dict() == {
        (model, on): word for model, word in (("ensemble", "better"), ("ridge", "the same"))
        for on in ("oof", "fold_0", "fold_1", "test")
    }  # fmt: skip
    assert status("HEAD,s1", "more,more-s1", "workspace") == (0, "")
    out = capsys.readouterr().out
    assert "one run each" not in out
    assert "Of HEAD (2 seeds) and workspace, one side is one run" in out
    assert status("more-s1", "workspace")[0] == 0
    assert "No param differs." in capsys.readouterr().out
    assert set(pd.read_csv("outputs/compare/compare.csv").verdict) == {"the same"}
    assert "No picture changed." in Path("outputs/compare/index.html").read_text()


def test_exit_statuses(repository, capsys):
    assert status("HEAD", "more", "--fail-if", "worse") == (0, "")
    assert status("HEAD", "more", "--fail-if", "not-better", "--at-least", "0.05") == (0, "")
    assert status("HEAD", "more", "--fail-if", "not-better", "--at-least", "0.2")[0] == 1
    assert status("HEAD", "more", "--fail-if", "not-better", "--model", "ridge")[0] == 1
    code, said = status("more", "more-s1", "HEAD", "s1", "--fail-if", "worse", "--at-least", "0.002")
    assert code == 1
    assert [line.split(", ")[0] for line in said.splitlines()] == [
        "compare: --fail-if worse ensemble:", "HEAD: worse by at least 0.002", "s1: worse by at least 0.002",
    ]  # fmt: skip
    assert status("more", "HEAD") == (0, "")
    capsys.readouterr()
    for wrong in (["a,a"], ["a", "b,"], ["a", "--fail-if", "odd"], ["--at-least", "0"], ["--at-least", "x"]):
        assert status(*wrong)[0] == 2
    for wrong, message in (
        (["HEAD", "nowhere"], r"nowhere: no outputs/scores/cosines\.parquet there .*`dvc exp show`"),
        (["HEAD", "more", "--model", "linear"], "--model linear: HEAD and more have ensemble, ridge in common"),
        (["HEAD", "more", "more"], "two experiments have the same name"),
        (["HEAD", "more-s1,workspace"], "more-s1 and workspace have the same cosines"),
    ):
        code, said = status(*wrong)
        assert code == 1
        assert re.search(message, said)
