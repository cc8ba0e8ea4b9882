"""Check params.yaml: every key with its type and range, before anything runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Self

import yaml
from pydantic import ValidationError, model_validator

from img2prompt.clip.params import ClipParams, EmbedImagesParams, FreezeParams
from img2prompt.core.params import Section, key_of, with_numbers
from img2prompt.ensemble.params import EnsembleParams
from img2prompt.model_a.params import ModelAParams
from img2prompt.model_b.params import KnnParams
from img2prompt.prompts.params import DedupParams, EmbedPromptsParams, FoldsParams
from img2prompt.sources.params import PrepareParams


class Params(Section):
    """All of params.yaml."""

    prepare: PrepareParams
    embed_prompts: EmbedPromptsParams
    dedup: DedupParams
    folds: FoldsParams
    clip: ClipParams
    embed_images: EmbedImagesParams
    freeze: FreezeParams
    model_a: ModelAParams
    knn: KnnParams
    ensemble: EnsembleParams

    @model_validator(mode="after")
    def _matching(self) -> Self:
        count, unfreeze, clips = len(self.clip.models), self.model_a.unfreeze, self.ensemble.clips
        if isinstance(unfreeze, list) and len(unfreeze) != count:
            raise ValueError(
                f"model_a.unfreeze lists {len(unfreeze)} values for the {count} of clip.model: one each, or one for all"
            )
        if self.prepare.test.path == "sample" and "sample" not in [source.path for source in self.prepare.train]:
            raise ValueError(
                "prepare.test: `sample` follows from `sample` among prepare.train: name a source to predict"
            )
        if clips != "all" and max(clips) >= count:
            raise ValueError(f"ensemble.clips: {clips}: clip.model has the numbers 0 to {count - 1}")
        if untrained := {"linear", "model_a"} & {*self.ensemble.members} - {*self.model_a.heads}:
            raise ValueError(
                f"ensemble.members: {', '.join(sorted(untrained))}: model_a.heads does not train it: add it there, or "
                "take it out here"
            )
        return self


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check the whole of params.yaml.

    Raises:
        ValueError: names the file and every key that is unknown, missing, of the wrong type or out of range.
    """
    # YAML 1.1 reads 1e-3 as text; a number written so is still a number.
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return Params.model_validate(with_numbers(values))
    except ValidationError as error:
        lines = [
            f"  {key_of(e['loc'])}: {e['msg']} (got {e['input']!r:.80})" if e["loc"] else f"  {e['msg']}"
            for e in error.errors()
        ]
        raise ValueError(f"{path}: fix these keys\n" + "\n".join(lines)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument: which file to check."""
    parser.add_argument("path", nargs="?", type=Path, default=Path("params.yaml"))


def main(options: argparse.Namespace) -> None:
    """Check the file; if keys are faulty, end the process with an error that lists them."""
    try:
        load_params(options.path)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
