"""What trains of each family's image tower, and an epoch of it: seconds and peak memory, a process for each model.

    python bench/towers.py --images FOLDER [--unfreeze 4] [--checkpoints] [--drawn] [ViT-B-32 ViT-L-14 ...]

The models have random weights and are written as open_clip folders first. An epoch is the validation rows' as well. At
the end stands what 90,000 images would take; --docs puts this table into docs/clip.md.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from img2prompt.cli.documents import caption, put
from img2prompt.clip.features import Embedder, Images
from img2prompt.clip.model import load_clip, save_clip
from img2prompt.clip.towers import frozen, groups, is_cut, tower, unfrozen
from img2prompt.core.process import made
from img2prompt.model_a.heads import LinearHead
from img2prompt.model_a.inputs import Drawn, Inputs, Stored
from img2prompt.model_a.ridge import ridge
from img2prompt.model_a.training import Schedule, fit
from img2prompt.model_a.validation import Validation
from img2prompt.report.scores import markdown

MODELS = ["ViT-B-32", "ViT-L-14", "ViT-B-16-SigLIP", "EVA02-B-16", "convnext_base"]
MANY = 90_000  # images of a large competition
TITLES = ["CLIP", "layers", "store", "peak memory", "one pass of the tower", "an epoch"]


def write(name: str, folder: Path) -> None:
    """A folder of the model; where its tokenizer is a hub's, with open_clip's own, for no text is read here."""
    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    if config["text_cfg"].pop("hf_tokenizer_name", None):
        config["text_cfg"] |= {"vocab_size": 49408, "tokenizer_kwargs": {}}
        open_clip.factory._MODEL_CONFIGS[name] = config
    save_clip(open_clip.create_model(name), SimpleTokenizer(), config, folder)


def what_trains(layers: nn.Sequential, visual: nn.Module, count: int) -> tuple[list[str], int]:
    """The modules that `unfreeze` trains, and how many numbers they have."""
    names = {id(value): name for name, value in getattr(visual, "trunk", visual).named_parameters()}
    last = [value for group in groups(layers)[-count:] for value in group.values()]
    modules = []
    for value in last:
        parts = names[id(value)].split(".")
        end = max([place for place, part in enumerate(parts[:4]) if part.isdigit()], default=0)
        modules.append(".".join(parts[: end + 1]))
    return list(dict.fromkeys(modules)), sum(value.numel() for value in last)


def measure(folder: Path, images: list[str], count: int, checkpoints: bool, drawn: bool) -> list[str]:
    """Print a model's lines; the cells of the table for MANY images."""
    torch.manual_seed(0)
    clip = load_clip(folder, "cpu")
    layers, rows = tower(clip.model.visual), np.arange(len(images))
    print(f"{folder.name}: {len(groups(layers))} layers")
    for asked in (1, 4):
        modules, numbers = what_trains(layers, clip.model.visual, asked)
        print(f"  unfreeze {asked} trains {numbers:,} numbers: {', '.join(modules)}")
    start = time.perf_counter()
    seen, embed = Images(images, clip.transform), Embedder(clip, "cpu", count, ["pooled", "frozen"])
    found = [embed(x) for x in seen.batches(np.array_split(rows, max(1, len(rows) // 32)))]
    pooled, before = (torch.cat([batch[name] for batch in found]) for name in ("pooled", "frozen"))
    stored = time.perf_counter() - start
    store, times = "none", MANY / len(images)
    inputs: dict[str, Inputs] = {"without store": Drawn(seen, frozen(layers, count), "cpu")}
    if is_cut(layers):
        each = 2 * before[0].numel()
        store = f"{each / 1e3:.0f} KB an image, {MANY * each / 1e9:.1f} GB"
        print(f"  store {store} for {MANY:,}; it took {stored:.1f} s")
        inputs = {"from the store": Stored(before.numpy())} | (inputs if drawn else {})
    targets = nn.functional.normalize(torch.randn(len(rows), 384)).numpy()
    regression, watch = ridge(pooled, torch.from_numpy(targets)), rows[::10]
    plan = Schedule(
        epochs=1, lr_tower=1e-5, lr_head=1e-4, layer_decay=1.0, mse=0.0, pull=1.0, ema=0.0, batch_size=64,
        accumulate=1, weight_decay=0.1, warmup=0.1, clip_grad=1.0, grad_checkpointing=checkpoints, seed=(0,),
    )  # fmt: skip
    row = []
    for what, x in inputs.items():
        last, head = unfrozen(layers, count), LinearHead(regression, 0.2, 0)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as resume:
            validation = Validation(x, watch, targets[watch], watch, -1.0, 64, "cpu")
            fit(
                last, head, x, targets[None], np.setdiff1d(rows, watch), plan, "cpu", Path(resume) / "epoch",
                validation, folder.name,
            )  # fmt: skip
        epoch, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"  an epoch of {count} layers {what}, {len(rows)} images: {epoch:.1f} s, peak {peak:.1f} GB", flush=True)
        hours = [f"{seconds * times / 3600:.1f} h" for seconds in (stored, epoch)]
        row = row or [folder.name, str(len(groups(layers))), store, f"{peak:.1f} GB", hours[0], f"{hours[1]} {what}"]
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="open_clip's names")
    parser.add_argument("--images", type=Path, required=True, help="a folder")
    parser.add_argument("--count", type=int, default=200, help="of the images")
    parser.add_argument("--unfreeze", type=int, default=4)
    parser.add_argument("--checkpoints", action="store_true", help="model_a.grad_checkpointing")
    parser.add_argument("--drawn", action="store_true", help="an epoch without store too")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/clip.md")
    args = parser.parse_args()
    rows = []
    images = sorted(str(path) for path in args.images.iterdir())[: args.count]
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as home,
        ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as alone,
    ):
        for name in args.models:
            folder = Path(home) / name
            folder.mkdir()
            alone.submit(write, name, folder).result()
            measured = alone.submit(measure, folder, images, args.unfreeze, args.checkpoints, args.drawn)
            rows.append(measured.result())
    table = markdown([TITLES, ["---"] * len(TITLES), *rows])
    of = f"Random weights, {len(images)} images, {torch.get_num_threads()} threads"
    table += f"\n{caption(of, [made()], [f'model_a.unfreeze={args.unfreeze}'])}"
    print(table)
    if args.docs:
        put({"towers": table}, Path(__file__).resolve().parent.parent)
