"""prepare: the train side's rows, images with prompts and prompts alone; what cannot be used is set aside."""

from contextlib import closing
from pathlib import Path

from img2prompt.core.rows import read_rows
from img2prompt.core.sheet import draw_examples
from img2prompt.core.storage import whole_folder
from img2prompt.sample.images import drawn
from img2prompt.sample.wording import generate
from img2prompt.sources.params import PrepareParams
from img2prompt.sources.reading import Quarantine, is_texts, read, read_texts, write_rows, write_texts
from pipelines import run

OUT = Path("outputs/prepare")


def main(prepare: PrepareParams) -> None:
    """Write train.parquet, texts.parquet, quarantine.csv, examples.jpg and, for the sample, train.tar."""
    limit = prepare.max_quarantined
    texts = [source for source in prepare.train if is_texts(source)]
    with whole_folder(OUT) as out, closing(Quarantine(out / "quarantine.csv")) as quarantine:
        with write_rows(out / "train.parquet", quarantine) as train:
            for source in prepare.train:
                if source.path == "sample":
                    rows = generate(prepare.sample.n_train, prepare.sample.seed)
                    train.add([drawn([(row.prompt, row.scene) for row in rows], out / "train.tar", OUT)])
                elif source not in texts:
                    train.add(read(source, "train", limit))
        if not train.count:
            raise ValueError("prepare.train: prompts without images only; name a source with images too")
        with write_texts(out / "texts.parquet", quarantine) as more:
            for source in texts:
                more.add(read_texts(source, limit))
        examples = read_rows(out / "train.parquet", ["image", "prompt"], some=18)
        # The sample's tar is not in its place yet.
        examples.image = examples.image.str.replace(f"{OUT}/", f"{out}/", n=1, regex=False)
        draw_examples(out / "examples.jpg", examples)
    print(f"train {train.count}, prompts without images {more.count}")
    print("set aside:", quarantine)


if __name__ == "__main__":
    run(main)
