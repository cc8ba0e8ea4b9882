"""prepare_test: the rows to predict, in their order, and their targets where prompts are known."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.core.device import device
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import whole_folder
from img2prompt.prompts.encoder import Encoder
from img2prompt.prompts.params import EmbedPromptsParams
from img2prompt.sample.images import drawn
from img2prompt.sample.scenes import scene_from_json
from img2prompt.sources.params import PrepareParams
from img2prompt.sources.reading import Quarantine, read, write_rows
from pipelines import run

OUT = Path("outputs/prepare_test")


def main(prepare: PrepareParams, embed_prompts: EmbedPromptsParams) -> None:
    """Write test.parquet, targets.npy, quarantine.csv and, for the sample, test.tar.

    targets.npy (k, 384) float32, norm 1: of the k rows whose prompt is known, in order.
    """
    with whole_folder(OUT) as out, closing(Quarantine(out / "quarantine.csv")) as quarantine:
        with write_rows(out / "test.parquet", quarantine) as test:
            if prepare.test.path == "sample":
                sample = pd.read_parquet("outputs/embed_prompts/sample_test.parquet")
                prompts = list(zip(sample.prompt, map(scene_from_json, sample.scene), strict=True))
                test.add([drawn(prompts, out / "test.tar", OUT)])
            else:
                test.add(read(prepare.test, "test", prepare.max_quarantined))
        if prepare.test.path == "sample":
            targets = np.load("outputs/embed_prompts/sample_test.npy")
        else:
            prompts = read_rows(out / "test.parquet", ["prompt"]).prompt.dropna().tolist()
            targets = Encoder(embed_prompts.model, device())(prompts)
        np.save(out / "targets.npy", targets)
    print(f"test {test.count}, prompts known of {len(targets)}")
    print("set aside:", quarantine)


if __name__ == "__main__":
    run(main)
