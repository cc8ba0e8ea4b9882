from pathlib import Path

import pytest
import yaml

from img2prompt.cli.check import load_params

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT = yaml.safe_load((REPOSITORY / "params.yaml").read_text())


def written(tmp_path, **changes):
    values = yaml.safe_load(yaml.safe_dump(DEFAULT))
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = values
        for section in sections:
            place = place[section]
        place[key] = value
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_a_member_is_trained(tmp_path):
    with pytest.raises(ValueError, match=r"ensemble\.members: linear: model_a\.heads does not train it"):
        load_params(written(tmp_path, ensemble__members=["linear", "model_b"]))
    with pytest.raises(ValueError, match=r"ensemble\.members: model_a: model_a\.heads does not train it"):
        load_params(written(tmp_path, model_a__heads=["linear"]))


def test_default_is_valid():
    assert load_params(REPOSITORY / "params.yaml").dedup.threshold == 0.85


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("dedup__threshold", 1.5, "dedup.threshold"),
        ("dedup__threshold", "high", "dedup.threshold"),
        ("dedup__treshold", 0.8, "dedup.treshold"),
        ("folds__ids", [0], "folds.ids"),
        ("folds__ids", [0, 0], "folds"),
        ("folds__ids", 5, "folds.ids"),
        ("ensemble__alpha", 2, "ensemble.alpha"),
        ("ensemble__alpha", "best", "ensemble.alpha"),
        ("ensemble__members", ["model_a", "ridge"], "ensemble"),
        ("ensemble__members", ["model_b", "model_b"], "ensemble"),
        ("ensemble__members", ["model_b", "constant"], "ensemble"),
        ("ensemble__members", ["model_a", "knn"], "ensemble.members"),
        ("knn__k", 0, "knn.k"),
        ("knn__keys", "pixels", "knn.keys"),
        ("knn__eps", 0.0, "knn.eps"),
        ("prepare__train", "sample", "prepare.train"),
        ("prepare__train", [], "prepare.train"),
        ("prepare__train", ["sample", "sample"], "prepare"),
        ("prepare__train", ["input/a", "input/b/../a/"], "prepare"),
        ("prepare__train", ["input/a", 5], "prepare.train.1"),
        ("prepare__train", [{"path": "a.csv", "prmpt": "words"}], "prepare.train.0.prmpt"),
        ("prepare__train", [{"path": "sample", "prompt": "words"}], "prepare.train.0"),
        ("prepare__test", "", "prepare.test.path"),
        ("prepare__max_quarantined", 2.0, "prepare.max_quarantined"),
        ("prepare__max_quarantined", "2%", "prepare.max_quarantined"),
        ("model_a__any_image", 1, "model_a.any_image"),
        ("prepare__sample__n_train", 10.5, "prepare.sample.n_train"),
        ("prepare__sample__seed", True, "prepare.sample.seed"),
        ("model_a__lr_head", float("nan"), "model_a.lr_head"),
        ("model_a__augmentation__flip", 1.1, "model_a.augmentation.flip"),
        ("model_a__linear", None, "model_a.linear"),
        ("model_a__heads", [], "model_a.heads"),
        ("model_a__heads", ["linear", "clip"], "model_a.heads.1"),
        ("model_a__tta", ["flip", "flip"], "model_a"),
        ("model_a__tta", ["mirror"], "model_a.tta.0"),
        ("model_a__layer_decay", 0, "model_a.layer_decay"),
        ("model_a__grad_checkpointing", "yes", "model_a.grad_checkpointing"),
        ("model_a__validation", 1, "model_a.validation"),
        ("model_a__unfreeze", [-1], "model_a.unfreeze"),
        ("ensemble__clips", [], "ensemble.clips"),
        ("ensemble__clips", [0, 0], "ensemble"),
        ("ensemble__clips", "first", "ensemble.clips"),
        ("clip__model", [], "clip.model"),
        ("clip__model", ["sample", "sample"], "clip"),
        ("clip__pretrained", ["openai", "openai"], "clip"),
        ("extra", {}, "extra"),
    ],
)
def test_wrong_value_is_named(tmp_path, path, value, key):
    file = written(tmp_path, **{path: value})
    with pytest.raises(ValueError, match=rf"params\.yaml.*\n.*  {key}[:.]"):
        load_params(file)


def test_all_wrong_values_are_named_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        load_params(written(tmp_path, dedup__threshold=2.0, ensemble__alpha=-1.0))
    assert "dedup.threshold" in str(error.value)
    assert "ensemble.alpha" in str(error.value)


def test_missing_key_is_named(tmp_path):
    values = yaml.safe_load(yaml.safe_dump(DEFAULT))
    del values["knn"]["k"]
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=r"knn\.k: Field required"):
        load_params(file)


def test_exponents_without_a_point_are_numbers(tmp_path):
    # YAML 1.1 reads 1e-3, as `-S model_a.lr_head=1e-3` may leave it, as text.
    file = written(tmp_path)
    file.write_text(file.read_text().replace("lr_head: 0.00", "lr_head: 1e-3 #"))
    assert load_params(file).model_a.lr_head == 0.001


def test_search_and_numbers_are_both_taken(tmp_path):
    assert load_params(written(tmp_path, ensemble__alpha=0.6)).ensemble.alpha == 0.6
    assert load_params(written(tmp_path, knn__k=100, knn__distance_dim=8)).knn.k == 100


def test_a_cross_fit_of_one_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cross_fit: 1 part"):
        load_params(written(tmp_path, model_a__cross_fit=1))
    assert load_params(written(tmp_path, model_a__cross_fit=0)).model_a.cross_fit == 0


def test_a_head_that_is_named_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="heads names a head twice"):
        load_params(written(tmp_path, model_a__heads=["model_a", "model_a"]))


def test_one_clip_or_several_with_one_tag_for_all_or_one_each(tmp_path):
    assert load_params(REPOSITORY / "params.yaml").clip.models == [("sample", None, None)]
    several = written(tmp_path, clip__model=["ViT-B-32", "sample:lite1"], clip__pretrained=["openai", None])
    assert load_params(several).clip.models == [("ViT-B-32", "openai", None), ("sample:lite1", None, None)]
    sizes = written(tmp_path, clip__model=["sample", "sample:lite1"], clip__image_size=160)
    assert load_params(sizes).clip.models == [("sample", None, 160), ("sample:lite1", None, 160)]


def test_sections_that_do_not_go_together_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"model_a\.unfreeze lists 2 values for the 1 of clip\.model"):
        load_params(written(tmp_path, model_a__unfreeze=[5, 0]))
    with pytest.raises(ValueError, match=r"ensemble\.clips: \[0, 2\]: clip\.model has the numbers 0 to 1"):
        load_params(written(tmp_path, clip__model=["sample", "sample:lite1"], ensemble__clips=[0, 2]))
    with pytest.raises(ValueError, match=r"prepare\.test: `sample` follows from `sample` among prepare\.train"):
        load_params(written(tmp_path, prepare__train=["input/mine"]))
    each = load_params(written(tmp_path, clip__model=["sample", "sample:lite1"], model_a__unfreeze=[5, 0])).model_a
    assert (each.layers(0), each.layers(1)) == (5, 0)
    assert load_params(written(tmp_path, model_a__unfreeze=3)).model_a.layers(7) == 3


def test_a_source_is_a_path_or_names_its_columns(tmp_path):
    mine = {"path": "input/mine.tsv", "image": "img", "prompt": "words", "fold": "part"}
    found = load_params(written(tmp_path, prepare__train=["sample", mine])).prepare
    assert [source.path for source in found.train] == ["sample", "input/mine.tsv"]
    assert (found.train[1].image, found.train[1].prompt, found.train[1].fold) == ("img", "words", "part")
    assert found.train[0].prompt is None
