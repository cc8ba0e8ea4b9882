"""prepare: one table of pictures and prompts for train and one for test; what cannot be used is set aside."""

from pathlib import Path

import pandas as pd
from joblib import Parallel, delayed

from img2prompt.device import device
from img2prompt.encoder import Encoder
from img2prompt.figures import draw_examples
from img2prompt.params import Params
from img2prompt.pictures import pack
from img2prompt.progress import progress
from img2prompt.render import jpeg
from img2prompt.sample import Row, apart, draw, generate
from img2prompt.sources import SET_ASIDE, Rows, join, read_test, read_train, write_rows
from img2prompt.storage import digest, whole_folder
from pipelines import run

OUT = Path("outputs/prepare")


def render(rows: list[Row], split: str, folder: Path) -> Rows:
    """The sample's rows, their pictures in one tar."""
    jobs = Parallel(n_jobs=-1, return_as="generator")(delayed(jpeg)(row.scene) for row in rows)
    ids = [f"{number:06d}" for number in range(len(rows))]
    pictures = progress(jobs, f"drawing {split} pictures", len(rows), "picture")
    tar = f"{split}.tar"
    spans = pack(folder / tar, [f"{name}.jpg" for name in ids], pictures)
    places = [f"{OUT / tar}{span}" for span in spans]
    table = pd.DataFrame({"id": ids, "source": "sample", "picture": places, "prompt": [row.prompt for row in rows]})
    return Rows(table, pictures=digest(folder / tar))


def main(params: Params) -> None:
    """Write {train,test}.parquet, quarantine.csv, examples.jpg and, for the sample, {train,test}.tar."""
    section = params.prepare
    sample = section.sample
    with whole_folder(OUT) as out:
        drawn = generate(sample.n_train, sample.seed) if "sample" in section.train else []
        sources = [
            render(drawn, "train", out) if name == "sample" else read_train(Path(name)) for name in section.train
        ]
        train = join(sources)
        if section.test == "sample":
            # No test prompt may be nearly a train prompt, nor may what of it can be seen.
            encode = Encoder(params.embed_prompts.model, device())
            near = [encode(train.table.prompt), encode([row.visible for row in drawn])]
            candidates = draw(sample.seed, stream=1)
            test = render(apart(candidates, sample.n_test, near, encode), "test", out)
        else:
            test = read_test(Path(section.test))
        write_rows(out / "train.parquet", train)
        write_rows(out / "test.parquet", test)
        # The sample's tar is still aside.
        here = train.table.picture.str.replace(f"{OUT}/", f"{out}/", n=1, regex=False)
        draw_examples(out / "examples.jpg", train.table.assign(picture=here))
        aside = pd.DataFrame(train.set_aside + test.set_aside, columns=SET_ASIDE)
        aside.to_csv(out / "quarantine.csv", index=False)
    print(f"train {len(train.table)}, test {len(test.table)}, set aside {len(aside)}")


if __name__ == "__main__":
    run(main)
