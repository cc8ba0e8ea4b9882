"""BERT sentence encoders, read from their files and run without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize, scaled_dot_product_attention

from img2prompt.core.blocks import blocks
from img2prompt.core.storage import read_json

# oneDNN compiles a kernel for each new number of rows, which takes as long as several products in bfloat16.
STEP = 256


def _told(path: Path) -> Any:  # noqa: ANN401
    return read_json(path) if path.is_file() else {}


def is_bert(folder: Path) -> bool:
    """Whether a sentence-transformers folder has a model that `Bert` runs as the library does.

    That is a BERT in safetensors, the mean of its outputs, and nothing around them but the scaling to norm 1.
    """
    modules = _told(folder / "modules.json")
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return False
    home, pooling = folder / modules[0]["path"], _told(folder / modules[1]["path"] / "config.json")
    config, settings = _told(home / "config.json"), _told(home / "sentence_bert_config.json")
    whole = _told(folder / "config_sentence_transformers.json")
    modes = {name for name, value in pooling.items() if name.startswith("pooling_mode_") and value}
    if not (home / "tokenizer.json").is_file() or not (home / "model.safetensors").is_file():
        return False
    with safe_open(home / "model.safetensors", "pt") as file:
        named = "embeddings.LayerNorm.weight" in file.keys()  # noqa: SIM118
    return (
        named
        and (config.get("model_type"), config.get("hidden_act")) == ("bert", "gelu")
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("is_decoder")
        and (modes == {"pooling_mode_mean_tokens"} or pooling.get("pooling_mode") == "mean")
        and settings.keys()
        <= {"max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"}
        and settings.get("transformer_task", "feature-extraction") == "feature-extraction"
        and not settings.get("do_lower_case")
        and not whole.get("default_prompt_name")
        and not whole.get("truncate_dim")
    )


class Bert:
    """A BERT (Devlin et al., 2019) whose embedding of a text is the mean of its last layer's outputs.

    The texts of a call lie one behind the other without padding: products, norms and activations take all tokens at
    once, and attention, which then needs no mask, all texts of one length.

    Args:
        folder: one that `is_bert`.
        device: a torch device.
        dtype: of the matrix products and the attention; between them, and in the norms, it is float32.
    """

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        home = folder / read_json(folder / "modules.json")[0]["path"]
        config, settings = read_json(home / "config.json"), _told(home / "sentence_bert_config.json")
        longest = settings.get("max_seq_length") or _told(home / "tokenizer_config.json").get("model_max_length")
        self._tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(min(longest or np.inf, config["max_position_embeddings"]))

        weights = load_file(home / "model.safetensors", device)

        def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
            return weights[f"{name}.weight"].to(dtype), weights[f"{name}.bias"].to(dtype)

        words, places, kinds = (
            weights[f"embeddings.{name}_embeddings.weight"].float() for name in ("word", "position", "token_type")
        )
        self._words, self._places, self._norm = words, places + kinds[0], pair("embeddings.LayerNorm")
        self._layers = []
        for number in range(config["num_hidden_layers"]):
            at = f"encoder.layer.{number}"
            three = [pair(f"{at}.attention.self.{name}", dtype) for name in ("query", "key", "value")]
            self._layers.append(
                (
                    tuple(map(torch.cat, zip(*three, strict=True))),
                    pair(f"{at}.attention.output.dense", dtype),
                    pair(f"{at}.attention.output.LayerNorm"),
                    pair(f"{at}.intermediate.dense", dtype),
                    pair(f"{at}.output.dense", dtype),
                    pair(f"{at}.output.LayerNorm"),
                )
            )
        self._device, self._dtype, self._step = device, dtype, STEP if dtype is torch.bfloat16 else 1
        self._heads, self._eps, self.width = config["num_attention_heads"], config["layer_norm_eps"], words.shape[1]

    def tokenise(self, texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """The tokens of each of n texts, (length,) int32, as many as the model takes, and the n lengths, int64."""
        tokens = [
            np.array(found.ids, np.int32)
            for part in blocks(len(texts))
            for found in self._tokenizer.encode_batch_fast(texts[part])
        ]
        return tokens, np.fromiter(map(len, tokens), np.int64, len(tokens))

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """Embed the tokens of n texts, those of one length next to one another: (n, d) float32, rows of norm 1."""
        runs, total = [], 0  # the first row, the number of texts and their length
        for length, group in groupby(map(len, tokens)):
            count = len(list(group))
            runs.append((total, count, length))
            total += count * length
        rows = np.concatenate(tokens), np.concatenate([np.arange(len(text)) for text in tokens])
        words, places = (torch.from_numpy(np.pad(x, (0, -total % self._step))).to(self._device) for x in rows)

        x = self._normed(self._words[words] + self._places[places], self._norm)  # (m, d) float32
        for qkv, out, norm, up, down, last in self._layers:
            x = self._normed(x.add_(linear(self._attention(linear(x.to(self._dtype), *qkv), runs), *out)), norm)
            x = self._normed(x.add_(linear(gelu(linear(x.to(self._dtype), *up)), *down)), last)
        means = [x[start : start + count * length].view(count, length, -1).mean(1) for start, count, length in runs]
        return normalize(torch.cat(means)).cpu().numpy()

    def _normed(self, x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        return layer_norm(x, (self.width,), *weights, self._eps)

    def _attention(self, x: Tensor, runs: Sequence[tuple[int, int, int]]) -> Tensor:
        """From queries, keys and values (m, 3d) what each token takes from those of its text: (m, d)."""
        found = x.new_zeros(len(x), self.width)
        for start, count, length in runs:
            rows = slice(start, start + count * length)
            q, k, v = x[rows].view(count, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
            found[rows] = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count * length, -1)
        return found
