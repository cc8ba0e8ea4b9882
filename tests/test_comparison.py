import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dvc.repo import Repo
from PIL import Image

from img2prompt.cli.main import main
from img2prompt.core.metric import bootstrap_interval
from img2prompt.core.sheet import draw_changes
from img2prompt.report.comparison import differences, differences_markdown, most_changed, pair, results, verdict
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


def test_pairs_are_of_the_scored_images_of_both():
    first, second = cosines(ridge=0.0, linear=0.0), cosines(1, ridge=0.1, model_a=0.0)
    second = second.drop(index=[1, 2]).sample(frac=1, random_state=0)
    pairs, notes = pair(first, second)
    assert pairs.columns.tolist() == ["split", "source", "id", "fold", "group", "ridge_a", "ridge_b"]
    wanted = first[first.scored].drop(index=[1, 2])
    assert pairs.id.tolist() == wanted.id.tolist()  # A's order
    assert pairs.ridge_a.tolist() == wanted.ridge.tolist()
    assert pairs.ridge_b.tolist() == second.ridge.reindex(wanted.index).tolist()
    assert notes == [
        "train images: 48 scored in A, 46 in B; compared on the 46 of both",
        "only one of them has linear, model_a",
    ]
    assert pair(first, first)[1] == []


def test_other_folds_are_said_to_be_so():
    first = cosines(ridge=0.0)
    _, notes = pair(first, first.assign(fold=0))
    assert notes == ["the folds differ: the columns by fold are A's folds"]


def test_nothing_in_common_is_refused():
    first = cosines(ridge=0.0)
    for second in (first.assign(source="other"), first.rename(columns={"ridge": "linear"})):
        with pytest.raises(ValueError, match="in common"):
            pair(first, second)


def test_differences_are_paired_and_grouped():
    first, second = cosines(linear=0.0, ridge=0.0), cosines(1, linear=0.0, ridge=0.1)
    table = differences(pair(first, second)[0]).set_index(["model", "on"])
    assert table.index.tolist() == [(m, on) for m in ("linear", "ridge") for on in ("oof", "fold_0", "fold_1", "test")]
    rows = first.scored & (first.fold == 1)
    change = (second.ridge - first.ridge)[rows].astype(float)
    found = table.loc["ridge", "fold_1"]
    assert found.images == rows.sum()
    assert found.difference == pytest.approx(change.mean())
    assert found.b - found.a == pytest.approx(found.difference)
    assert (found.low, found.high) == pytest.approx(bootstrap_interval(change, first.group[rows]), abs=1e-7)


def test_verdicts():
    assert [verdict(*interval) for interval in ((0.01, 0.02), (-0.02, -0.01), (-0.01, 0.01), (0.0, 0.0))] == [
        "better", "worse", "within noise", "the same",
    ]  # fmt: skip
    assert verdict(np.nan, np.nan) == "unknown"


def test_a_constant_gain_is_found_and_noise_is_not():
    first = cosines(linear=0.0, ridge=0.0, model_a=0.0)
    noise = np.random.default_rng(1).normal(0, 0.01, len(first))
    second = first.assign(
        linear=first["linear"] + noise, ridge=first.ridge + noise + 0.02, model_a=first.model_a - 0.01
    )
    table = differences(pair(first, second)[0])
    found = table[table.on == "oof"].set_index("model").verdict.to_dict()
    assert found == {"linear": "within noise", "ridge": "better", "model_a": "worse"}
    overall, by_fold = differences_markdown(table).split("\n\n")
    assert overall.splitlines()[0] == (
        "| model | oof, A | oof, B | B - A [95%] | B is | test, A | test, B | B - A [95%] | B is |"
    )
    assert "| better |" in overall.splitlines()[3]
    assert by_fold.splitlines()[0] == "| model | fold_0 | fold_1 |"


def test_most_changed_and_its_figure(tmp_path):
    first = cosines(ridge=0.0)
    second = first.copy()
    second["ridge"] += pd.Series({2: 0.1, 7: 0.3, 61: 0.2, 3: -0.1, 4: -0.2}).reindex(first.index, fill_value=0)
    pairs, _ = pair(first, second)
    better, worse = most_changed(pairs, "ridge", 2)
    assert better[["split", "id"]].values.tolist() == [["train", "p7"], ["test", "p1"]]
    assert worse.id.tolist() == ["p4", "p3"]
    Image.new("RGB", (40, 20), "red").save(tmp_path / "p.png")
    better = better.assign(image=[str(tmp_path / "p.png"), None], prompt=["a red thing", None])
    draw_changes(tmp_path / "out.png", better, worse.assign(image=None, prompt=None))
    sheet = np.asarray(Image.open(tmp_path / "out.png").convert("RGB"))
    assert (sheet == [255, 0, 0]).all(axis=2).any()
    draw_changes(tmp_path / "one.png", better, worse[:0].assign(image=None, prompt=None))
    assert Image.open(tmp_path / "one.png").size == Image.open(tmp_path / "out.png").size


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


DVC_YAML = """
stages:
  scores:
    cmd: mkdir -p outputs/scores && cp ${cosines}.parquet outputs/scores/cosines.parquet
    params: [cosines]
    outs: [outputs/scores/]
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a run at HEAD, an experiment `better`, and as its workspace what the experiment was."""
    monkeypatch.chdir(tmp_path)
    for who in ("AUTHOR", "COMMITTER"):
        for what in ("NAME", "EMAIL"):
            monkeypatch.setenv(f"GIT_{who}_{what}", "x@y")
    table = cosines(ridge=0.0)
    table.to_parquet("first.parquet")
    table.assign(ridge=table.ridge + 0.1).to_parquet("second.parquet")
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("params.yaml").write_text("cosines: first\n")
    Path(".gitignore").write_text("/outputs/\n")
    subprocess.run(["git", "init", "-q"], check=True)
    with Repo.init() as repo:
        repo.reproduce()
        subprocess.run("git add . && git commit -qm first", shell=True, check=True)
        repo.experiments.run(name="more", params=["cosines=second"])


def compare(*names):
    main(["compare", *names])


def test_experiments_and_revisions_are_read_from_dvc(repository, capsys):
    compare("HEAD", "more")
    assert capsys.readouterr().out.startswith("A is HEAD, B is more.\n\n| model | oof, A |")
    found = pd.read_csv("outputs/compare/compare.csv")
    assert found.difference.tolist() == pytest.approx([0.1] * 4)
    assert set(found.verdict) == {"better"}
    assert Path("outputs/compare/ridge.png").is_file()
    compare("more", "workspace")
    assert set(pd.read_csv("outputs/compare/compare.csv").verdict) == {"the same"}
    assert not Path("outputs/compare/ridge.png").exists()
    with pytest.raises(SystemExit, match=r"nowhere: no outputs/scores/cosines\.parquet there .*`dvc exp show`"):
        compare("HEAD", "nowhere")
    with pytest.raises(SystemExit):
        compare("HEAD")
    assert "the following arguments are required: B" in capsys.readouterr().err
