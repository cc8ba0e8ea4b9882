import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from img2prompt.core.storage import grow
from img2prompt.prompts import encoder
from img2prompt.prompts.bert import Bert, is_bert
from img2prompt.prompts.encoder import EMBEDDED, Encoder, Library, folder_of

TEXTS = [
    "a cat", "a considerably longer prompt about a dog, oil on canvas", "a cat", "", "ultrafine detailed painting",
    "Ünïcode 猫, “quoted” [SEP] 🎨\nnew line", "word " * 400, "a dog",
]  # fmt: skip


@pytest.fixture(scope="module")
def encode():
    return Encoder(EMBEDDED, "cpu")


@pytest.fixture(scope="module")
def library():
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder_of(EMBEDDED)), device="cpu")


def test_rows_have_norm_one_and_keep_their_order(encode):
    embeddings = encode(TEXTS)
    assert embeddings.shape == (8, 384)
    assert embeddings.dtype == np.float32
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert np.array_equal(embeddings[0], embeddings[2])
    assert np.allclose(encode(TEXTS[::-1])[::-1], embeddings, atol=1e-6)


def test_agrees_with_the_library(encode, library):
    """Also where a text is longer than what the model takes."""
    assert isinstance(encode._model, Bert)
    assert np.allclose(encode(TEXTS), library.encode(TEXTS, normalize_embeddings=True), atol=1e-6)


@pytest.mark.parametrize("together", [1, 20, 2048])
def test_what_is_embedded_beside_a_text_changes_nothing(encode, together, monkeypatch):
    monkeypatch.setattr(encode, "_together", together)
    alone = np.concatenate([encode([text]) for text in TEXTS])
    assert np.allclose(encode(TEXTS), alone, atol=1e-6)


def test_batches_are_filled_and_in_order():
    lengths = np.array([2, 2, 3, 5, 5, 9])
    found = encoder._batches(np.arange(6)[::-1], lengths, 7)
    assert [batch.tolist() for batch in found] == [[5, 4, 3], [2], [1], [0]]


def test_no_texts(encode):
    assert encode([]).shape == (0, 384)


def test_a_killed_run_goes_on_to_the_same_bytes(encode, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_together", 20)
    monkeypatch.setattr("img2prompt.core.engine.grow", partial(grow, seconds=0))
    model, calls = encode._model, []

    def killed(tokens):
        calls.append(len(tokens))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return model(tokens)

    monkeypatch.setattr(encode, "_model", killed)
    killed.tokenise, killed.width = model.tokenise, model.width
    with pytest.raises(KeyboardInterrupt):
        encode(TEXTS, resume=tmp_path / "run")
    found = encode(TEXTS, resume=tmp_path / "run")
    assert sum(calls) - calls[3] == len(set(TEXTS))  # none was embedded twice
    monkeypatch.setattr(encode, "_model", model)
    assert np.array_equal(found, encode(TEXTS))


@pytest.mark.parametrize("has", [True, False])
def test_what_need_not_be_exact_is_so_nearly(encode, has, monkeypatch):
    monkeypatch.setattr(encoder, "has_bfloat16", lambda device: has)
    exact, found = encode(TEXTS), Encoder(EMBEDDED, "cpu", exact=False)(TEXTS)
    assert np.array_equal(Encoder(EMBEDDED, "cpu")(TEXTS), exact)
    assert np.array_equal(found, exact) is not has
    assert np.abs((found * exact).sum(1) - 1).max() < 1e-4
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_meaning(encode):
    cat, kitten, bridge = encode(["a photo of a cat", "an image of a kitten", "a suspension bridge at night"])
    assert cat @ kitten > cat @ bridge + 0.2


# --- models of other kinds ---


@pytest.fixture
def folder(tmp_path):
    """MiniLM's folder, to change, with a link to its weights."""
    weights, copy = "model.safetensors", tmp_path / "minilm"
    shutil.copytree(folder_of(EMBEDDED), copy, ignore=shutil.ignore_patterns(weights))
    (copy / weights).symlink_to(folder_of(EMBEDDED) / weights)
    return copy


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}),
        ("config_sentence_transformers.json", {"prompts": {"near": "say: "}, "default_prompt_name": "near"}),
        ("config_sentence_transformers.json", {"truncate_dim": 64}),
    ],
)
def test_another_model_is_run_by_the_library(folder, file, values):
    change(folder / file, **values)
    from sentence_transformers import SentenceTransformer

    found = Encoder(str(folder), "cpu")
    assert isinstance(found._model, Library)
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
    assert np.allclose(found(TEXTS), expected, atol=1e-6)
    assert found([]).shape == (0, expected.shape[1])


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"model_type": "roberta"}),
        ("config.json", {"hidden_act": "relu"}),
        ("config.json", {"position_embedding_type": "relative_key"}),
        ("sentence_bert_config.json", {"do_lower_case": True}),
        ("sentence_bert_config.json", {"query_length": 32}),
    ],
)
def test_what_is_not_known_is_left_to_the_library(folder, file, values):
    assert is_bert(folder)
    change(folder / file, **values)
    assert not is_bert(folder)


@pytest.mark.parametrize("file", ["modules.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json"])
def test_a_folder_that_lacks_a_file_is_left_to_the_library(folder, file):
    (folder / file).unlink()
    assert not is_bert(folder)


def test_a_model_that_the_library_saved_is_read(encode, library, tmp_path):
    library.save(str(tmp_path))
    assert is_bert(tmp_path)
    assert np.array_equal(Bert(tmp_path, "cpu", torch.float32)(encode._model.tokenise(TEXTS[:1])[0]), encode(TEXTS[:1]))
    assert max(Bert(tmp_path, "cpu", torch.float32).tokenise(TEXTS)[1]) == 256
