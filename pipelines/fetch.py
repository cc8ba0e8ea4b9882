"""fetch: every CLIP of params.yaml that is not the sample's, before anything is computed or removed."""

import logging
from pathlib import Path

from img2prompt.clip.params import ClipParams, sample_tower
from img2prompt.core.storage import whole_folder
from pipelines import run


def main(clip: ClipParams) -> None:
    """Leave the CLIPs where `clip` takes them from; write `fetched.txt`, the same whichever they are.

    All stages wait for it, and none that does not read a CLIP runs again for another one.
    """
    if any(sample_tower(model) is None for model, _, _ in clip.models):
        from img2prompt.clip.model import fetched_folder, materialise, settle_hub  # slow to import

        logging.disable(logging.ERROR)  # what open_clip logs before it raises is said in one line
        settle_hub()
        ahead = fetched_folder(clip.models)
        for number, (model, pretrained, size) in enumerate(clip.models):
            if sample_tower(model) is None and not (ahead / str(number)).is_dir():
                with whole_folder(ahead / str(number)) as folder:
                    materialise(model, pretrained, size, folder)
    with whole_folder(Path("outputs/fetch")) as out:
        (out / "fetched.txt").write_text("Every CLIP of params.yaml is at hand.\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
