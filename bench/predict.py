"""`img2prompt predict` against the forward pass of its models alone; broken images, kills, and the pipeline's vectors.

    python bench/predict.py                   # where the pipeline has run: on outputs/ and its test images
    python bench/predict.py --words 0         # without words

The images are files, 20 of them broken. `forward` is one pass of all towers and heads on batches of tensors that are in
memory already, with nothing read before and nothing mixed behind; `vectors` and `words` are what the command does with
a loaded model, the writing of the output included. Runs alternate; medians, and the least and the most. Vectors are the
pipeline's to the last bit where it ran with as many threads (IMG2PROMPT_THREADS). Then the command is killed (SIGKILL)
at random moments and runs to its end.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from img2prompt.core import process

process.settle()

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402

from img2prompt import Predictor  # noqa: E402
from img2prompt.cli.main import main as img2prompt  # noqa: E402
from img2prompt.cli.predict import BATCH  # noqa: E402
from img2prompt.core.blocks import blocks  # noqa: E402
from img2prompt.core.images import read_image  # noqa: E402
from img2prompt.predict.predictor import _Pictures, _together  # noqa: E402

COMMAND = [sys.executable, "-c", "from img2prompt.cli.main import main; main()", "predict"]


def write_images(folder: Path, count: int, broken: int) -> tuple[list[str], np.ndarray]:
    """Files of the run's test images, again from the first where they are too few; which of them can be read, bool."""
    stored = pq.read_table("outputs/prepare_test/test.parquet")["image"].to_pylist()
    readable = np.ones(count, bool)
    readable[np.random.default_rng(0).choice(count, broken, replace=False)] = False
    paths = [folder / f"{place:06d}.png" for place in range(count)]
    for place, path in enumerate(paths):
        data = read_image(stored[place % len(stored)])
        if readable[place]:
            path.write_bytes(data)
        elif place % 4:  # else it is missing
            path.write_bytes((b"", b"no image", data[: len(data) // 2])[place % 4 - 1])
    return list(map(str, paths)), readable


def forward(predictor: Predictor, batches: list[list[torch.Tensor]]) -> float:
    start = time.perf_counter()
    for views in batches:
        predictor._launch(views)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def command(folder: Path, paths: list[str], *options: str) -> float:
    """Seconds of the command in this process, without loading the model."""
    arguments = ["predict", *paths, "--output", str(folder / "out.jsonl"), "--overwrite", *options]
    start = time.perf_counter()
    try:
        img2prompt(arguments)
    except SystemExit as end:
        if end.code != 3:
            raise
    return time.perf_counter() - start


def kill(folder: Path, arguments: list[str], seconds: float, kills: int, rng: random.Random) -> str:
    """Kill the command that takes so many seconds, then let it end; how often it was killed and went on."""
    hits, log = 0, folder / "log"
    with log.open("w") as file:
        for _ in range(kills):
            running = subprocess.Popen([*COMMAND, *arguments], stderr=file, process_group=0)
            try:
                running.wait(rng.uniform(0.2, 1) * seconds)
                break
            except subprocess.TimeoutExpired:
                hits += 1
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
        status = subprocess.run([*COMMAND, *arguments], stderr=file, check=False).returncode
    return f"{hits} kills, then status {status}; went on {log.read_text().count('going on after')} times"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--broken", type=int, default=20)
    parser.add_argument("--words", type=int, default=128, help="images that get words too, in a run of their own")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as home:
        folder = Path(home)
        paths, readable = write_images(folder, args.images, args.broken)
        predictor = Predictor.load("outputs")
        fine = [path for path, good in zip(paths, readable, strict=True) if good]
        pictures = _Pictures(fine, [transform for clip in predictor._clips for transform in clip.transforms])
        batches = [_together([pictures[row] for row in range(len(fine))[part]])[0] for part in blocks(len(fine), BATCH)]
        Predictor.load = classmethod(lambda *_: predictor)  # the command takes the one that is loaded
        took: dict[str, list[float]] = {"forward": [], "vectors": [], "words": []}
        forward(predictor, batches[:2])
        for _ in range(args.runs):
            took["forward"].append(len(fine) / forward(predictor, batches))
            seconds = command(folder, paths, "--no-words", "--embeddings", str(folder / "v.npy"))
            took["vectors"].append(len(paths) / seconds)
            if args.words:
                took["words"].append(args.words / command(folder, paths[: args.words]))
        whole = statistics.median(took["forward"])
        for name, rates in took.items():
            if rates:
                middle = statistics.median(rates)
                print(
                    f"{name:8} {middle:7.1f} images a second [{min(rates):.1f}, {max(rates):.1f}]  {middle / whole:.0%}"
                )
        vectors, stored = np.load(folder / "v.npy"), np.load("outputs/scores/test.npy")
        same = vectors[readable] == np.resize(stored, vectors.shape)[readable]
        print(f"vectors: {same.all(1).sum()} of {readable.sum()} byte-identical to the pipeline's, largest difference "
              f"{np.abs(vectors - np.resize(stored, vectors.shape))[readable].max():.1g}; NaN in the "
              f"{np.isnan(vectors).all(1).sum()} others")  # fmt: skip
        rng, files = random.Random(0), {}
        for name in ("undisturbed", "killed"):
            out, embedded = folder / f"{name}.jsonl", folder / f"{name}.npy"
            arguments = [*paths, "--no-words", "--output", str(out), "--embeddings", str(embedded)]
            start = time.perf_counter()
            seconds = args.images / statistics.median(took["vectors"])
            said = kill(folder, arguments, seconds, args.kills * (name == "killed"), rng)
            print(f"{name}: {said}, {time.perf_counter() - start:.0f} s")
            files[name] = out.read_bytes(), embedded.read_bytes()
        print("the bytes are the same" if files["killed"] == files["undisturbed"] else "OTHER BYTES")


if __name__ == "__main__":
    main()
