"""The report: its numbers are those of the run, its text is escaped, and the same inputs give the same bytes."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import chain, change, stage

from img2prompt.core import process
from img2prompt.core.metric import bootstrap_interval
from img2prompt.report import findings
from img2prompt.report.charts import Line, chart
from img2prompt.report.page import LONGEST, Cell, Table, mean_cell, shortened
from img2prompt.report.run import Run
from img2prompt.words.words import Said

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """A page: its tables by caption, its tags with their attributes, and all of its text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.text, self._open, self._caption = {}, [], "", [], ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in VOID:
            return
        self._open.append(tag)
        if tag == "caption":
            self._caption = ""
        if tag == "tr" and self._caption:
            self.tables.setdefault(self._caption, []).append([])
        if tag in ("th", "td") and self._caption:
            self.tables[self._caption][-1].append("")
        if tag == "table":
            self._caption = ""

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("script", "style"):
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data
        elif self._caption and ("th" in self._open or "td" in self._open):
            self.tables[self._caption][-1][-1] += data

    def values(self, tag, attribute):
        return [attributes[attribute] for name, attributes in self.tags if name == tag and attribute in attributes]


def page():
    return Page(Path("outputs/report/index.html").read_text(encoding="utf-8"))


@pytest.fixture
def wordless(monkeypatch):
    """Composing prompts takes most of the report's time, and most tests do not look at them."""
    words = SimpleNamespace(load=lambda *_: lambda embeddings: [Said("composed", 0.5, [], [])] * len(embeddings))
    monkeypatch.setattr("pipelines.report.Words", words)


def test_its_numbers_are_the_runs(home):
    tables, scores = page().tables, json.loads(Path("outputs/scores.json").read_text())
    head, *rows = tables["Mean cosine of every model"]
    assert head[:5] == ["model", "fold 3", "fold 7", "mean", "std"]
    assert [row[0] for row in rows] == ["constant", "ridge", "linear", "model_a", "model_b", "ensemble"]
    for name, *cells in rows:
        assert cells[:4] == [f"{scores[name][key]:.4f}" for key in ("fold_3", "fold_7", "mean", "std")]
        assert cells[4].startswith(f"{scores[name]['oof']:.4f} [")
        assert cells[6].startswith(f"{scores[name]['test']:.4f} [")
    cosines = pd.read_parquet("outputs/scores/cosines.parquet")
    train = cosines[cosines.scored & (cosines.split == "train")]
    gain = train.ensemble - train.constant
    low, high = bootstrap_interval(gain, train.group)
    assert rows[-1][6] == f"{gain.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
    members = pd.read_csv("outputs/ensemble/members.csv")
    assert [row[:2] for row in tables["Weights of the members"][1:]] == [
        [row.member, f"{row.weight:.4f}"] for row in members.itertuples()
    ]
    thresholds = pd.read_csv("outputs/dedup/thresholds.csv")
    assert [row[1] for row in tables["Prompts kept by threshold"][1:]] == [str(kept) for kept in thresholds.kept]
    assert tables["Rows set aside by reason"][1:] == [["test", "input/test", "unreadable image", "1"]]
    assert tables["Rows set aside"][1][3] == "p003"
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold
    assert [row[:2] for row in tables["Rows of each fold"][1:]] == [[str(k), str((fold == k).sum())] for k in (3, 7)]


def test_the_gallery_shows_the_best_and_the_worst_with_their_nearest_prompts(home):
    text = page().text
    cosines, rows = (
        pd.read_parquet("outputs/scores/cosines.parquet"),
        pd.read_parquet("outputs/prepare_test/test.parquet"),
    )
    test = cosines[cosines.split == "test"].assign(image=rows.image.to_numpy())
    readable = test[test.image.notna()]
    best = text.partition("Best")[2]
    assert re.search(r"0\.\d{3}", best)[0] == f"{readable.ensemble.max():.3f}"
    worst = text.partition("Worst")[2].partition("Disagreement")[0]
    assert re.search(r"-?0\.\d{3}", worst)[0] == f"{readable.ensemble.min():.3f}"
    predicted = np.load("outputs/predict/knn/model_b.npy")
    targets, prompts = (
        np.load("outputs/embed_prompts/train.npy"),
        pd.read_parquet("outputs/prepare/train.parquet").prompt,
    )
    number = rows.id.tolist().index(readable.id[readable.ensemble.idxmax()])
    assert prompts[(targets @ predicted[number]).argmax()] in best
    assert "p003" not in best  # cannot be read


def test_it_asks_for_nothing_and_can_be_walked(home):
    found = page()
    assert all(source.startswith("data:image/webp;base64,") for source in found.values("img", "src"))
    assert all(reference.startswith(("#", "data:")) for tag in ("a", "link") for reference in found.values(tag, "href"))
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {reference[1:] for reference in found.values("a", "href")} <= set(ids)
    assert len(found.values("img", "alt")) == len(found.values("img", "src")) > 0
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(level <= before + 1 for before, level in pairwise(levels))


def test_same_inputs_same_bytes(copy):
    file = Path("outputs/report/index.html")
    before = file.read_bytes()
    stage("report")
    assert file.read_bytes() == before
    assert len(before) < 5e6


HOSTILE = [
    "<script>hacked = 1</script>",
    '"><img src=x onerror=alert(1)>',
    "</style>' & {{ 7 * 7 }}",
    "\u202eمرحبا <b>x",
]


def test_text_from_elsewhere_stays_text(copy, wordless):
    """Prompts, ids and file names are whatever somebody wrote."""
    plain = page()
    for path in (Path("outputs/prepare/train.parquet"), Path("outputs/prepare_test/test.parquet")):
        table = pd.read_parquet(path)
        table["prompt"] = [f"{HOSTILE[row % len(HOSTILE)]} {row}" for row in range(len(table))]
        table.to_parquet(path)
    Path("outputs/prepare/quarantine.csv").write_text(
        "split,source,row,id,reason,fix\n" + f"train,s,1,{HOSTILE[0]},missing image,<b>fix</b>\n"
    )
    stage("report")
    found = page()
    assert len(found.values("script", "src")) == 0
    assert [tag for tag, _ in found.tags].count("script") == [tag for tag, _ in plain.tags].count("script") == 1
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert all(text in found.text for text in HOSTILE)
    assert found.tables["Rows set aside"][1][3:] == [HOSTILE[0], "missing image", "<b>fix</b>"]


def test_without_known_test_prompts_it_shows_train_pictures_out_of_fold(copy, wordless):
    Path("input/test/prompts.csv").unlink()
    chain(["prepare_test", "scores", "report"])
    found = page()
    assert "whose prompts are unknown, so there are no scores on test" in found.text
    assert "No test prompt is known, so these are of" in found.text
    assert "Without known test prompts, none can be held against the train prompts." in found.text
    assert not any("on test" in column for column in found.tables["Mean cosine of every model"][0])
    oof = pd.read_parquet("outputs/scores/cosines.parquet")
    oof = oof[oof.scored]
    assert re.search(r"0\.\d{3}", found.text.partition("Best")[2])[0] == f"{oof.ensemble.max():.3f}"
    prompts = pd.read_parquet("outputs/prepare/train.parquet").prompt
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold
    best = oof.ensemble.idxmax()
    shown = found.text.partition("Best")[2].partition("model_b")[2]
    nearest = next(prompt for prompt in sorted(prompts, key=len, reverse=True) if prompt in shown[:200])
    assert fold[prompts.tolist().index(nearest)] != fold[best]


def test_what_is_not_there_is_said(copy, wordless):
    change(dedup={"threshold": 1.0})
    for file in Path("outputs/model_a").rglob("linear_history.csv"):
        file.write_text("epoch,loss,score\n")
    for file in Path("input/train/images").iterdir():
        file.unlink()
    Path("outputs/prepare_test/quarantine.csv").write_text("split,source,row,id,reason,fix\n")
    stage("dedup")
    stage("report")
    text = page().text
    assert "No prompt was dropped: dedup.threshold is 1." in text
    assert "There is no history of linear: nothing was trained" in text
    assert "This picture cannot be read any more." in text
    assert "Nothing: every row of every source could be used." in text
    assert "They stand in outputs/run.js, which is not beside this page" in text
    change(dedup={"threshold": 0.85, "at_random": True})
    stage("dedup")
    stage("report")
    assert "Rows were dropped at random" in page().text
    assert "There are no two prompts to show." in page().text


@pytest.mark.parametrize("what", [findings.by_cluster, lambda run: findings.by_length(run)["table"]])
def test_parts_of_the_prompts_make_the_whole(home, monkeypatch, what):
    monkeypatch.setattr(findings, "FEW", 5)
    run = Run.read(Path("outputs"))
    longer = [f"{prompt}{' more' * (row % 4)}" for row, prompt in enumerate(run.oof.prompt)]
    run.__dict__["oof"] = run.oof.assign(prompt=longer)  # what the run would have read
    found = what(run)
    assert len(found.rows) > 2
    assert found == what(run)
    pictures, ensemble = (list(found.columns).index(name) for name in ("pictures", "ensemble [95%]"))
    counts = [row[pictures].number for row in found.rows]
    assert sum(counts) == len(run.oof) == np.load("outputs/dedup/scored.npy").sum()
    mean = np.average([row[ensemble].number for row in found.rows], weights=counts)
    assert mean == pytest.approx(run.oof.ensemble.astype(float).mean())


def test_clusters_are_named_by_what_sets_them_apart(home, monkeypatch):
    monkeypatch.setattr(findings, "FEW", 5)
    run = Run.read(Path("outputs"))
    words = {word for prompt in run.oof.prompt for word in re.findall(r"\w\w+", prompt.lower())}
    for name, *_, example in findings.by_cluster(run).rows:
        assert set(name.text.split(", ")) <= words
        assert example.text in set(run.oof.prompt)
    run.__dict__["oof"] = run.oof.assign(prompt="the of")
    assert {row[0].text for row in findings.by_cluster(run).rows} == {"no word but stop words"}


def test_a_chart_s_places():
    lines = [
        Line("up", [0, 1, 2], [0.0, 0.5, 1.0], "main"),
        Line("at", [1], [0.2], "second", [0.1], [0.3], joined=False),
    ]
    found = chart("t", "a", "x", "y", lines, {"here": 2})
    first, second = found.drawn
    places = np.array(first["dots"])
    assert np.allclose(np.diff(places, axis=0)[0], np.diff(places, axis=0)[1], atol=0.2)
    assert np.all(np.diff(places[:, 0]) > 0)
    assert np.all(np.diff(places[:, 1]) < 0)  # upwards
    ((x1, low, x2, high),) = second["intervals"]
    assert x1 == x2 == places[1, 0]
    assert low > second["dots"][0][1] > high
    assert second["path"] == ""
    assert found.marks == [(places[2, 0], "here")]
    assert found.figures == [["x", "up"], ["0", "0.0000"], ["1", "0.5000"], ["2", "1.0000"]]
    named = chart(
        "t", "a", "x", "", [Line("l", [0.1, 0.2], [0, 1], "main", [0.0, 0.1], [0.2, 0.3])], y_names=["a", "b"]
    )
    assert [label for _, label in named.y_ticks] == ["a", "b"]
    assert named.drawn[0]["dots"][0][1] < named.drawn[0]["dots"][1][1]  # the first at the top
    assert named.drawn[0]["intervals"][0][1] == named.drawn[0]["intervals"][0][3]


def test_cells():
    values = pd.Series([0.1, 0.2, 0.3, 0.4])
    found = mean_cell(values, pd.Series([0, 0, 1, 1]), "+")
    assert found.number == pytest.approx(0.25)
    assert (found.text, found.interval) == ("+0.2500", f"[{found.ends[0]:+.4f}, {found.ends[1]:+.4f}]")
    assert mean_cell(values, pd.Series([0, 0, 0, 0])).interval == ""  # one group tells nothing of the spread
    table = Table.of("c", pd.DataFrame({"a": ["x"], "b": [12345], "c": [0.5], "d": [np.nan]}))
    assert table.rows == [[Cell("x"), Cell("12,345", 12345), Cell("0.5000", 0.5), Cell("unknown")]]
    assert shortened("y" * (LONGEST + 7)) == f"{'y' * LONGEST} … (7 more characters)"


def test_a_stage_s_time_and_memory_have_one_line_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("knn", "model_a 3", "model_a 7", "knn"):
        with process.turn(name, recorded=True):
            pass
    with process.turn("compare"):
        pass
    lines = Path("outputs/run.js").read_text().splitlines()
    assert all(re.fullmatch(r"stage\(\{.*\}\);", line) for line in lines)
    found = [json.loads(line[len("stage(") : -len(");")]) for line in lines]
    assert [record["name"] for record in found] == ["model_a 3", "model_a 7", "knn"]
    assert all(record["seconds"] >= 0 and record["peak_gb"] > 0 for record in found)
    assert process.records() == found
    assert process.made().items() <= found[0].items()
    assert found[0]["versions"]["numpy"] == np.__version__
    with pytest.raises(SystemExit), process.turn("folds", recorded=True):
        raise ValueError("no")
    assert Path("outputs/run.js").read_text().splitlines() == lines
