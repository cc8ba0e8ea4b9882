"""The trained model as one object: what the pipeline predicts, one image at a time or all together."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from img2prompt import Predictor
from img2prompt.core.rows import read_rows


@pytest.fixture
def predictor(made, monkeypatch):
    monkeypatch.chdir(made)
    return Predictor.load("outputs", "cpu")


@pytest.fixture
def images(made):
    """The references of the test images; None where an image cannot be read."""
    return read_rows(made / "outputs/prepare_test/test.parquet").image.tolist()


def test_it_predicts_what_the_pipeline_predicts(predictor, images):
    found = predictor.predict(images)
    np.testing.assert_array_equal(found.embeddings, np.load("outputs/scores/test.npy"))
    assert set(found.members) == {"ridge", "linear", "model_a", "model_b"}
    readable = np.array([image is not None for image in images])
    assert not readable.all()
    for name, predicted in found.members.items():
        part = "knn" if name == "model_b" else "model_a"
        np.testing.assert_array_equal(predicted[readable], np.load(f"outputs/predict/{part}/{name}.npy")[readable])


def test_a_prediction_is_a_function_of_the_image_alone(predictor, images):
    together = predictor.predict(images).embeddings
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = predictor.predict([images[place] for place in order], batch_size=5).embeddings
    np.testing.assert_allclose(shuffled, together[order], atol=1e-5)
    for place, image in enumerate(images):
        np.testing.assert_allclose(predictor.predict([image]).embeddings[0], together[place], atol=1e-5)


def test_paths_bytes_and_images_are_taken(predictor, images):
    path = Path(images[0])
    expected = predictor.predict([path]).embeddings
    buffer = io.BytesIO()
    Image.open(path).convert("RGBA").save(buffer, "PNG")
    for image in (str(path), path.read_bytes(), buffer.getvalue(), Image.open(path), Image.open(buffer)):
        np.testing.assert_array_equal(predictor.predict([image]).embeddings, expected)
    assert predictor.predict([]).embeddings.shape == (0, 384)


def test_what_cannot_be_read_is_named(predictor, tmp_path):
    with pytest.raises(OSError, match=r"nothing\.png"):
        predictor.predict([tmp_path / "nothing.png"])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png: UnidentifiedImageError"):
        predictor.predict([tmp_path / "text.png"])


def test_images_that_fail_change_no_byte_of_the_others(predictor, images, tmp_path):
    """In a stream they stand as the pipeline's do, and say why."""
    (tmp_path / "text.png").write_text("no image")
    wrong = {2: tmp_path / "nothing.png", 5: tmp_path / "text.png"}
    given = [wrong.get(place, image) for place, image in enumerate(images)]
    found = list(predictor.stream(given, batch_size=5))
    assert [len(part.embeddings) for part in found] == [5, 5, 2]
    errors = [error for part in found for error in part.errors]
    assert {place for place, error in enumerate(errors) if error} == set(wrong)
    assert isinstance(errors[2], FileNotFoundError)
    assert str(errors[5]).startswith(f"{tmp_path / 'text.png'}: UnidentifiedImageError")
    missing = predictor.predict([None]).embeddings[0]
    expected = list(predictor.stream(images, batch_size=5))
    for part, (one, other) in enumerate(zip(found, expected, strict=True)):
        for row in range(len(one.embeddings)):
            same = missing if 5 * part + row in wrong else other.embeddings[row]
            np.testing.assert_array_equal(one.embeddings[row], same)


def test_many_are_read_by_other_processes_with_the_same_bytes(predictor, images, tmp_path, monkeypatch):
    many = [*images * 25, tmp_path / "nothing.png"]
    found = []
    for workers in (0, 2):
        monkeypatch.setattr("torch.get_num_threads", lambda workers=workers: workers)
        found.append(list(predictor.stream(many)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.embeddings, other.embeddings)
        assert list(map(repr, one.errors)) == list(map(repr, other.errors))
    assert isinstance(found[1][-1].errors[-1], FileNotFoundError)


def test_it_needs_no_outputs_folder_and_no_other_file(made, images, tmp_path, monkeypatch):
    for part in ("clip", "model_a", "knn", "ensemble"):
        shutil.copytree(made / "outputs" / part, tmp_path / "model" / part)
    references = [None if image is None else made / image for image in images]
    monkeypatch.chdir(tmp_path)
    found = Predictor.load(tmp_path / "model", "cpu").predict(references)
    np.testing.assert_array_equal(found.embeddings, np.load(made / "outputs/scores/test.npy"))


def test_models_of_another_clip_are_refused(made, tmp_path):
    for part in ("clip", "model_a", "knn", "ensemble"):
        shutil.copytree(made / "outputs" / part, tmp_path / part)
    shutil.copy(tmp_path / "model_a/fold_3/0/ridge.safetensors", tmp_path / "model_a/fold_3/0/linear.safetensors")
    with pytest.raises(ValueError, match=r"fold_\d/0|other settings"):
        Predictor.load(tmp_path, "cpu")
