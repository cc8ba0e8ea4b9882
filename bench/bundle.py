"""A bundle of a finished run at its real size: what it weighs, loads in, refuses and predicts, and the kernel with it.

    python bench/bundle.py RUN --work FOLDER [--only size damage vectors wheel kernel] [--images 7 2000 16000]

RUN: a project's folder whose pipeline has run, as `make submission` leaves it; it is only read. `wheel` installs our
wheel with its prediction dependencies into an empty environment, and predicts there, without a network (`unshare
--net`). `kernel` runs infer.py so, in that environment less what Kaggle's image lacks: on so many images (those of the
run's test, over and over, and one broken file), few in every layout of mounts, many also with a budget of one minute.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
OFFLINE = ["unshare", "--map-root-user", "--net"]

PREDICT = """
import json, sys, time
import numpy as np
start = time.perf_counter()
from img2prompt import Predictor
imported = time.perf_counter()
predictor = Predictor.load(sys.argv[1], "cpu")
loaded = time.perf_counter()
images = json.loads(open(sys.argv[2]).read())
found = predictor.predict(images).embeddings if images else np.empty((0, 384))
np.save(sys.argv[3], found)
predicted = time.perf_counter()
said = predictor.words(found[:10])
print(f"import {imported - start:.1f} s, load {loaded - imported:.1f} s, {len(images)} images "
      f"{predicted - loaded:.1f} s, 10 in words {time.perf_counter() - predicted:.1f} s ({said[0].prompt!r})")
"""


def run(*command: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    if check and done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done


def export(home: Path, folder: Path, *options: str) -> None:
    code = "from img2prompt.cli.main import main; main()"
    done = run(PYTHON, "-c", code, "export", folder, *options, cwd=home, PYTHONPATH=str(REPOSITORY / "src"))
    print(done.stdout.strip(), flush=True)


def size(home: Path, work: Path) -> None:
    for name, *options in (("half",), ("single", "--float32", "--no-thumbnails")):
        export(home, work / name, *options)
    parts: dict[str, int] = {}
    for path in (work / "half").iterdir():
        part = path.name.split(".")[0]
        parts[part] = parts.get(part, 0) + path.stat().st_size
    print(", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sorted(parts.items(), key=lambda x: -x[1])))


def damage(work: Path) -> None:
    from img2prompt.predict.bundle import Bundle

    folder = shutil.copytree(work / "half", work / "damaged", dirs_exist_ok=True)
    files, refused = sorted(folder.iterdir()), 0
    for path in files:
        data = path.read_bytes()
        middle = len(data) // 2
        changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        for damaged in (None, data[:middle], changed):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            try:
                Bundle.read(folder)
            except (OSError, ValueError) as error:
                refused += path.name in str(error)
            path.write_bytes(data)
    Bundle.read(folder)
    print(f"{len(files)} files, each missing, cut short and with one bit changed: {refused} of {3 * len(files)} named")
    shutil.rmtree(folder)


def images_of(home: Path) -> list[str | None]:
    import pyarrow.parquet as pq

    found = pq.read_table(home / "outputs/prepare_test/test.parquet")["image"].to_pylist()
    return [image and str(home / image) for image in found]


def vectors(home: Path, work: Path, python: Path | str, offline: bool, **environment: str) -> None:
    import numpy as np

    (work / "images.json").write_text(json.dumps(images_of(home)))
    known = np.load(home / "outputs/scores/test.npy")
    for name in ("half", "single"):
        command = [python, "-c", PREDICT, work / name, work / "images.json", work / "found.npy"]
        done = run(*(OFFLINE if offline else []), *command, cwd=work, **environment)
        off = np.abs(np.load(work / "found.npy") - known).max(axis=1)
        print(
            f"{name}: {done.stdout.strip()}; off the pipeline's vectors: {off.max():.2g}, median {np.median(off):.2g}"
        )


def environment(work: Path) -> Path:
    """An empty environment with our wheel and what it asks for itself."""
    bin = work / "empty/bin"
    if not (bin / "img2prompt").is_file():
        run("python3.11", "-m", "venv", work / "empty", cwd=work)
        constraints = [part for name in ("requirements", "constraints") for part in ("-c", REPOSITORY / f"{name}.txt")]
        (wheel,) = (work / "kaggle").glob("img2prompt-*.whl")
        run(bin / "pip", "install", "--quiet", wheel, *constraints, cwd=work)
    return bin / "python"


def kernel(home: Path, work: Path, counts: list[int]) -> None:
    import pyarrow.parquet as pq

    from img2prompt.core.images import read_image
    from img2prompt.predict.submission import check_submission

    python = environment(work)
    lacking = ("img2prompt", "open_clip_torch", "ftfy", "wcwidth")
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *lacking, cwd=work)
    references = [
        f"{home}/{ref}" for ref in pq.read_table(home / "outputs/prepare_test/test.parquet")["image"].to_pylist()
    ]
    data = work / "competition"
    layouts = [
        ("img2prompt-bundle", "stable-diffusion-image-to-prompts"),
        ("datasets/me/img2prompt-bundle", "competitions/stable-diffusion-image-to-prompts"),
        ("datasets/me/img2prompt-bundle", "stable-diffusion-image-to-prompts"),
        ("img2prompt-bundle", "competitions/stable-diffusion-image-to-prompts"),
    ]
    for count in counts:
        shutil.rmtree(data, ignore_errors=True)
        (data / "images").mkdir(parents=True)
        ids = [f"{(number * 7919) % count:08x}" for number in range(count)]
        for number, name in enumerate(sorted(ids)):
            (data / f"images/{name}.jpg").write_bytes(read_image(references[number % len(references)]))
        (data / f"images/{ids[-1]}.jpg").write_bytes(b"broken")
        with (data / "sample_submission.csv").open("w") as file:
            file.write("imgId_eId,val\n")
            file.writelines(f"{name}_{element},0.0\n" for name in ids for element in range(384))
        few = count <= 100
        for bundle_at, data_at in layouts if few else layouts[:1]:
            for minutes in ("500",) if few else ("1", "500"):
                mount = work / "input"
                shutil.rmtree(mount, ignore_errors=True)
                for at, target in ((bundle_at, work / "kaggle"), (data_at, data)):
                    (mount / at).parent.mkdir(parents=True, exist_ok=True)
                    (mount / at).symlink_to(target)
                options = ["--input", mount, "--output", work / "submission.csv", "--minutes", minutes]
                start = time.monotonic()
                done = run(*OFFLINE, python, work / "kaggle/kernel/infer.py", *options, cwd=work, PYTHONPATH="")
                print(f"\n{count} images, {bundle_at}, {data_at}, {minutes} minutes: {time.monotonic() - start:.0f} s")
                print(done.stdout.strip(), flush=True)
                check_submission(work / "submission.csv", ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=lambda path: Path(path).resolve())
    parser.add_argument("--work", type=lambda path: Path(path).resolve(), required=True)
    steps = ("size", "damage", "vectors", "wheel", "kernel")
    parser.add_argument("--only", nargs="+", choices=steps, default=steps)
    parser.add_argument("--images", nargs="+", type=int, default=[7, 16_000])
    options = parser.parse_args()
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    # The run is read by links: the export takes outputs/ for its own, and locks it.
    home = work / "run"
    (home / "outputs").mkdir(parents=True, exist_ok=True)
    for path in [*(options.run / "outputs").iterdir(), options.run / "params.yaml"]:
        link = home / path.relative_to(options.run)
        if path.name not in (".lock", ".resume") and not link.exists():
            link.symlink_to(path)
    if "size" in options.only:
        size(home, work)
    if "damage" in options.only:
        damage(work)
    if "vectors" in options.only:
        vectors(home, work, PYTHON, offline=False, PYTHONPATH=str(REPOSITORY / "src"))
    if {"wheel", "kernel"} & {*options.only}:
        export(home, work / "kaggle", "--kaggle", "--no-thumbnails")
        print(f"with wheels: {sum(path.stat().st_size for path in (work / 'kaggle').iterdir()) / 1e6:.1f} MB")
    if "wheel" in options.only:
        print("in an empty environment with the wheel, without a network:")
        vectors(home, work, environment(work), offline=True, PYTHONPATH="")
    if "kernel" in options.only:
        kernel(home, work, options.images)


if __name__ == "__main__":
    main()
