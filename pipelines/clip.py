"""clip: one open_clip folder, whether from the sample, a hub or a disk."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from img2prompt.clip.model import fetched_folder, materialise
from img2prompt.clip.params import ClipParams, sample_tower
from img2prompt.core.device import device
from img2prompt.core.images import open_image
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import RESUME, resume_folder, room, whole_folder
from img2prompt.prompts.encoder import Encoder
from img2prompt.prompts.params import EmbedPromptsParams
from img2prompt.sample import small_clip
from img2prompt.sample.distinct import apart
from img2prompt.sample.wording import draw
from pipelines import run

TRAIN = Path("outputs/prepare/train.parquet")
CODE = [room("core"), room("clip"), room("prompts"), room("sample"), Path(__file__)]


def some_images(count: int) -> list[str]:
    """Where up to `count` of the train images are."""
    return read_rows(TRAIN, ["image"], some=count).image.tolist()


def image_size(references: Sequence[str]) -> int:
    """Their median shorter side in pixels, within what an ImageNet tower is good for."""
    return int(np.clip(np.median([min(open_image(reference).size) for reference in references]), 128, 224))


def main(clip: ClipParams, embed_prompts: EmbedPromptsParams) -> None:
    """Write the CLIPs that every later stage loads: folders 0, 1, ... in the order of params.yaml.

    pairs.npy (p, 384): of the prompts that the sample's CLIPs have learned from, if any.
    """
    where, ahead = device(), fetched_folder(clip.models)
    with whole_folder(Path("outputs/clip")) as out:
        samples: dict[Path, tuple[str, int]] = {}
        for number, (model, pretrained, size) in enumerate(clip.models):
            folder, tower = out / str(number), sample_tower(model)
            if tower is None and (ahead / folder.name).is_dir():
                (ahead / folder.name).rename(folder)
                continue
            folder.mkdir()
            if tower is None:
                materialise(model, pretrained, size, folder)
            else:
                samples[folder] = tower, size or image_size(some_images(99))
        if not samples:
            return
        # The sample's CLIPs learn from images of their own: none of a prompt near one to train on, or near one of the
        # sample's test prompts, whatever is predicted later.
        near = [np.load(f"outputs/embed_prompts/{name}.npy") for name in ("train", "sample_test")]
        encode, sample = Encoder(embed_prompts.model, where), clip.sample
        pairs, embeddings = apart(draw(sample.seed, stream=2), sample.pairs, near, encode, distinct=False)
        own = some_images(2000)  # enough for principal components
        names = {str(folder): tower for folder, tower in samples.items()}
        # What is trained depends on it all: a killed run goes on only if none of it has changed.
        key = [sample.model_dump_json(), where, repr(names), "\n".join(map(repr, pairs)), TRAIN, *CODE]
        resume = resume_folder("clip", *key)
        built = small_clip.build(pairs, own, samples, sample.epochs, sample.seed, where, resume)
        np.save(out / "pairs.npy", embeddings)
    shutil.rmtree(RESUME / "clip")
    for folder, recall in built.items():
        print(f"clip {folder.name}, held-out pairs: {recall}")


if __name__ == "__main__":
    run(main)
