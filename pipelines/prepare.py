"""prepare: one table of images and prompts for train and one for test; what cannot be used is set aside."""

from contextlib import closing
from pathlib import Path

from joblib import Parallel, delayed

from img2prompt.core.device import device
from img2prompt.core.images import pack
from img2prompt.core.progress import progress
from img2prompt.core.rows import Row, read_rows
from img2prompt.core.sheet import draw_examples
from img2prompt.core.storage import digest, whole_folder
from img2prompt.prompts.encoder import Encoder
from img2prompt.prompts.params import EmbedPromptsParams
from img2prompt.sample.distinct import apart
from img2prompt.sample.render import jpeg
from img2prompt.sample.scenes import PromptedScene
from img2prompt.sample.wording import draw, generate
from img2prompt.sources.params import PrepareParams
from img2prompt.sources.reading import Batch, Quarantine, is_texts, read, read_texts, write_rows, write_texts
from pipelines import run

OUT = Path("outputs/prepare")


def render(rows: list[PromptedScene], split: str, folder: Path) -> list[Batch]:
    """The sample's rows, their images in one tar."""
    jobs = Parallel(n_jobs=-1, return_as="generator")(delayed(jpeg)(row.scene) for row in rows)
    ids = [f"{number:06d}" for number in range(len(rows))]
    images = progress(jobs, f"drawing {split} images", len(rows), "image")
    tar = f"{split}.tar"
    spans = pack(folder / tar, [f"{name}.jpg" for name in ids], images)
    table = [
        Row(name, "sample", f"{OUT / tar}{span}", row.prompt) for name, span, row in zip(ids, spans, rows, strict=True)
    ]
    return [Batch(table, [], digest(folder / tar).encode())]


def main(prepare: PrepareParams, embed_prompts: EmbedPromptsParams) -> None:
    """Write {train,test,texts}.parquet, quarantine.csv, examples.jpg and, for the sample, {train,test}.tar."""
    section = prepare
    sample, limit = section.sample, section.max_quarantined
    drawn = generate(sample.n_train, sample.seed) if "sample" in [source.path for source in section.train] else []
    texts = [source for source in section.train if is_texts(source)]
    with whole_folder(OUT) as out, closing(Quarantine(out / "quarantine.csv")) as quarantine:
        with write_rows(out / "train.parquet", quarantine) as train:
            for source in section.train:
                if source.path == "sample":
                    train.add(render(drawn, "train", out))
                elif source not in texts:
                    train.add(read(source, "train", limit))
        if not train.count:
            raise ValueError("prepare.train: prompts without images only; name a source with images too")
        with write_texts(out / "texts.parquet", quarantine) as more:
            for source in texts:
                more.add(read_texts(source, limit))
        with write_rows(out / "test.parquet", quarantine) as test:
            if section.test.path == "sample":
                # No test prompt may be nearly a train prompt, nor may what of it can be seen.
                encode = Encoder(embed_prompts.model, device())
                known = [read_rows(out / f"{name}.parquet", ["prompt"]).prompt for name in ("train", "texts")]
                near = [*map(encode, known), encode([row.visible for row in drawn])]
                candidates = draw(sample.seed, stream=1)
                test.add(render(apart(candidates, sample.n_test, near, encode), "test", out))
            else:
                test.add(read(section.test, "test", limit))
        examples = read_rows(out / "train.parquet", ["image", "prompt"], some=18)
        # The sample's tar is still aside.
        examples.image = examples.image.str.replace(f"{OUT}/", f"{out}/", n=1, regex=False)
        draw_examples(out / "examples.jpg", examples)
    print(f"train {train.count}, test {test.count}, prompts without images {more.count}")
    reasons = [f"{count} {reason}" for reason, count in quarantine.counts.most_common()]
    print("set aside:", ", ".join(reasons) or "nothing")


if __name__ == "__main__":
    run(main)
