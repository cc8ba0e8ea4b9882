"""Reading each layout: rows a second, and peak memory with 10,000 and with 100,000 images.

    python bench/prepare.py --folder /tmp/layouts

Images are JPEGs of 64 x 64, made in --folder once; every one is decoded, as `prepare` does. Each reading is a process
of its own, so that its peak memory is its own. Memory that grew with the images would grow tenfold.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZES = (10_000, 100_000)
# Readers see no difference between equal images: a few distinct ones are enough.
RNG = np.random.default_rng(0)


def image() -> bytes:
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 255, (8, 8, 3), np.uint8)).resize((64, 64)).save(file, "JPEG")
    return file.getvalue()


IMAGES = [image() for _ in range(64)]


def rows(n: int) -> Iterator[tuple[str, str, bytes]]:
    for number in range(n):
        name = f"{number:08x}"
        yield name, f'a "{name}" castle, by the sea, highly detailed, number {number}', IMAGES[number % 64]


def table(path: Path, **columns: list) -> None:
    pq.write_table(pa.table(columns), path)


def kaggle(home: Path, n: int) -> Path:
    (home / "images").mkdir(parents=True)
    with (home / "prompts.csv").open("w") as file:
        file.write("imgId,prompt\n")
        for name, prompt, data in rows(n):
            (home / f"images/{name}.jpg").write_bytes(data)
            file.write(f'{name},"{prompt.replace(chr(34), chr(34) * 2)}"\n')
    return home


def diffusiondb(home: Path, n: int) -> Path:
    index = {}
    for number, (name, prompt, data) in enumerate(rows(n)):
        part = home / f"part-{number // 1000 + 1:06d}"
        part.mkdir(parents=True, exist_ok=True)
        (part / f"{name}.webp").write_bytes(data)
        index[f"{name}.webp"] = {"p": prompt, "se": 1, "c": 7.0, "st": 50, "sa": "k_lms"}
        if number % 1000 == 999:
            (part / f"{part.name}.json").write_text(json.dumps(index))
            index = {}
    return home


def diffusiondb_metadata(home: Path, n: int) -> Path:
    """Prompts alone."""
    home.mkdir(parents=True)
    names, prompts, _ = zip(*rows(n), strict=True)
    table(home / "metadata.parquet", image_name=names, prompt=prompts, part_id=[i // 1000 + 1 for i in range(n)])
    return home


def imagefolder(home: Path, n: int) -> Path:
    home.mkdir(parents=True)
    with (home / "metadata.jsonl").open("w") as file:
        for number, (name, prompt, data) in enumerate(rows(n)):
            (home / f"{number // 1000}").mkdir(exist_ok=True)
            (home / f"{number // 1000}/{name}.jpg").write_bytes(data)
            file.write(json.dumps({"file_name": f"{number // 1000}/{name}.jpg", "text": prompt}) + "\n")
    return home


def webdataset(home: Path, n: int) -> Path:
    home.mkdir(parents=True)
    everything = enumerate(rows(n))
    for shard in range(-(-n // 10_000)):
        with tarfile.open(home / f"{shard:05d}.tar", "w") as tar:
            for _, (number, (_, prompt, data)) in zip(range(10_000), everything, strict=False):
                key = f"{number:09d}"
                for suffix, value in (("jpg", data), ("json", json.dumps({"caption": prompt, "key": key}).encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(value)
                    tar.addfile(member, io.BytesIO(value))
    return home


def img2dataset(home: Path, n: int) -> Path:
    listed: dict[int, list] = {}
    for number, (_, prompt, data) in enumerate(rows(n)):
        shard = home / f"{number // 10_000:05d}"
        shard.mkdir(parents=True, exist_ok=True)
        (shard / f"{number:09d}.jpg").write_bytes(data)
        listed.setdefault(number // 10_000, []).append((f"{number:09d}", prompt))
    for shard, values in listed.items():
        keys, captions = zip(*values, strict=True)
        statuses = {"status": ["success"] * len(keys), "error_message": [None] * len(keys)}
        table(home / f"{shard:05d}.parquet", key=keys, caption=captions, **statuses)
    return home


def own_table(home: Path, n: int) -> Path:
    kaggle(home, n)
    with (home / "mine.tsv").open("w") as file:
        file.write("image\tprompt\tfold\n")
        for number, (name, prompt, _) in enumerate(rows(n)):
            file.write(f'images/{name}.jpg\t"{prompt.replace(chr(34), chr(34) * 2)}"\t{number % 5}\n')
    return home / "mine.tsv"


def texts(home: Path, n: int) -> Path:
    """Prompts alone."""
    home.mkdir(parents=True)
    (home / "prompts.txt").write_text("\n".join(prompt for _, prompt, _ in rows(n)))
    return home / "prompts.txt"


LAYOUTS = (kaggle, diffusiondb, diffusiondb_metadata, imagefolder, webdataset, img2dataset, own_table, texts)


def measure(path: Path, out: Path) -> None:
    """In a process of its own: prints rows, seconds and peak memory, and that before reading, in MB."""
    from img2prompt.sources.params import Source
    from img2prompt.sources.reading import Quarantine, is_texts, read, read_texts, write_rows, write_texts

    source = Source(path=str(path))
    peak = [peak_mb()]
    quarantine = Quarantine(out / "quarantine.csv")
    reader, writer = (read_texts, write_texts) if is_texts(source) else (read, write_rows)
    start = time.perf_counter()
    with writer(out / "rows.parquet", quarantine) as rows:
        rows.add(reader(source) if reader is read_texts else reader(source, "train"))
    seconds = time.perf_counter() - start
    peak.append(peak_mb())
    print(json.dumps({"rows": rows.count, "seconds": seconds, "before": peak[0], "peak": peak[1]}))


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs=2, default=SIZES)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.folder)
    print(f"{'layout':22}{'rows':>8}{'rows/s':>9}{'peak MB':>9}{'of it reading':>15}{'bytes a row more':>18}")
    for layout in LAYOUTS:
        found = []
        for n in options.sizes:
            home = options.folder / f"{layout.__name__}_{n}"
            done = home.with_suffix(".path")
            if not done.is_file():
                done.write_text(str(layout(home, n)))
            command = [sys.executable, __file__, "--folder", str(options.folder), "--measure", done.read_text()]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            found.append(json.loads(run.stdout))
            assert found[-1]["rows"] == n, found
        few, many = found
        grown = 1e6 * (many["peak"] - few["peak"]) / (many["rows"] - few["rows"])
        for result, more in ((few, ""), (many, f"{grown:.0f}")):
            print(
                f"{layout.__name__:22}{result['rows']:>8}{result['rows'] / result['seconds']:>9.0f}"
                f"{result['peak']:>9.0f}{result['peak'] - result['before']:>15.0f}{more:>18}",
                flush=True,
            )


if __name__ == "__main__":
    main()
