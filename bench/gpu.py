"""A large CLIP on a GPU: embedding, and an epoch with and without store, against the tower's own speed on that card.

    python bench/gpu.py --model ViT-L-14 --images 90000 --unfreeze 4

Weights are random; JPEGs of 512 x 512 pixels are made once and read again and again. What the tower alone can do is
measured on a batch that lies on the GPU. `busy` is the share of the time in which a kernel ran, as NVML samples it.
"""

import argparse
import io
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import open_clip
import pynvml
import torch
from joblib import Parallel, delayed
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor

from img2prompt.clip.features import Embedder, Images, image_features
from img2prompt.clip.model import load_clip, save_clip
from img2prompt.clip.towers import frozen, tower, unfrozen
from img2prompt.core.device import autocast, device, half_precision
from img2prompt.model_a.heads import LinearHead
from img2prompt.model_a.inputs import Drawn, Inputs, Stored
from img2prompt.model_a.ridge import refit, ridge
from img2prompt.model_a.training import Schedule, fit
from img2prompt.model_a.validation import Validation


def jpeg(number: int) -> bytes:
    """A picture with edges and noise: about as many bytes as a photo's."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).resize(
        (512, 512), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.int16) + rng.normal(0, 8, (512, 512, 1)).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@contextmanager
def watched(what: str, count: int, limit: float | None = None) -> Iterator[None]:
    """Print pictures a second over the block, of the `limit`, with the GPU's busy share and the peak of its memory."""
    handle, shares, over = pynvml.nvmlDeviceGetHandleByIndex(0), [], threading.Event()

    def sample() -> None:
        while not over.wait(0.1):
            shares.append(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    yield
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    over.set()
    thread.join()
    of = f", {count / seconds / limit:.0%} of the limit" if limit else ""
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{what}: {count} in {seconds:.1f} s, {count / seconds:.0f} a second{of}, busy {np.mean(shares):.0f}%, "
        f"peak {peak:.1f} GB",
        flush=True,
    )


def rate(step: Callable[[], object], batch: int, repeats: int = 40) -> float:
    """Pictures a second of a step that nothing holds up."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    return batch * repeats / (time.perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-L-14")
    parser.add_argument("--images", type=int, default=90_000)
    parser.add_argument("--drawn", type=int, help="how many of them for the epoch without store; default: all")
    parser.add_argument("--made", type=int, default=2000, help="JPEGs that are made")
    parser.add_argument("--unfreeze", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    pynvml.nvmlInit()
    where, home = device(), Path(tempfile.mkdtemp())
    print(torch.cuda.get_device_name(), torch.__version__, f"{torch.get_num_threads()} CPU threads")

    torch.manual_seed(0)
    save_clip(open_clip.create_model(args.model), SimpleTokenizer(), open_clip.get_model_config(args.model), home)
    for number, data in enumerate(Parallel(-1)(delayed(jpeg)(number) for number in range(args.made))):
        (home / f"{number}.jpg").write_bytes(data)
    references = [str(home / f"{number % args.made}.jpg") for number in range(args.images)]
    clip = load_clip(home, where)
    layers = tower(clip.model.visual)
    size = clip.model.visual.image_size[0]
    x = torch.randn(args.batch, 3, size, size, device=where)
    embedder = Embedder(clip, where, args.unfreeze)
    forward = rate(lambda: embedder.launch(x), args.batch)
    print(f"limit, forward: {forward:.0f} a second", flush=True)

    last = unfrozen(layers, args.unfreeze).to(where).eval()
    middle = embedder(x)["frozen"].float()
    scaler = torch.amp.GradScaler("cuda", enabled=half_precision(where) is torch.float16)

    def step(inputs: Callable[[], Tensor]) -> None:
        with autocast(where):
            loss = last(inputs()).float().square().mean()
        scaler.scale(loss).backward()
        for parameter in last.parameters():
            parameter.grad = None

    def from_images() -> Tensor:
        with torch.no_grad(), autocast(where, torch.float16):
            return frozen(layers, args.unfreeze)(x)

    stored = rate(lambda: step(lambda: middle), args.batch)
    drawn = rate(lambda: step(from_images), args.batch)
    print(f"limit, forward and backward of {args.unfreeze} layers: {stored:.0f} from a store, {drawn:.0f} from images")

    with watched("reading and decoding alone", args.images // 4):
        for _ in Images(references[: args.images // 4], clip.transform).batches(
            np.array_split(np.arange(args.images // 4), args.images // 4 // args.batch)
        ):
            pass
    with watched("embedding", args.images, forward):
        files = image_features({"0": embedder}, references, args.batch, home / "found", "train")
    found = {name.removeprefix("0/train_"): np.load(path, mmap_mode="r") for name, path in files.items()}
    print(f"store: {found['frozen'].nbytes / 1e9:.1f} GB")

    rng = np.random.default_rng(0)
    targets = rng.normal(size=(args.images, 384)).astype(np.float32)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    some = np.arange(4000)
    data = found["pooled"][some], targets[some]
    start = ridge(*data)
    others = refit(start, *data, [some % 5 == part for part in range(5)])
    plan = Schedule(
        epochs=1, lr_tower=1e-5, lr_head=1e-4, layer_decay=1.0, mse=0.0, pull=1.0, ema=0.0, batch_size=args.batch,
        accumulate=1, weight_decay=0.1, warmup=0.1, clip_grad=1.0, grad_checkpointing=False, seed=(0,),
    )  # fmt: skip

    def epoch(what: str, inputs: Inputs, count: int, limit: float, checkpoints: bool = False) -> None:
        rows, watch = np.arange(count - 128), np.arange(count - 128, count)
        validation = Validation(inputs, watch, targets[watch], watch, -1.0, args.batch, where)
        head = LinearHead(start, 0.2, 0, others)
        with watched(what, len(rows), limit):
            fit(
                unfrozen(layers, args.unfreeze), head, inputs, targets[None], rows,
                Schedule(**vars(plan) | {"grad_checkpointing": checkpoints}), where, home / what, validation, what,
                np.arange(count) % 5,
            )  # fmt: skip

    store = Stored(found["frozen"], where)
    epoch("an epoch from the store", store, args.images, stored)
    epoch("an epoch from the store, again", store, args.images, stored)
    epoch("an epoch from the store, grad_checkpointing", store, args.images // 4, stored, checkpoints=True)
    count = args.drawn or args.images
    images = Drawn(Images(references, clip.transform), frozen(layers, args.unfreeze), where)
    epoch("an epoch without store", images, count, drawn)
