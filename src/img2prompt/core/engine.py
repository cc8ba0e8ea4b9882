"""The one door to machines: named pieces of work that leave files, made in this process or by a Ray cluster's tasks.

IMG2PROMPT_ENGINE says which: `local`, the default, or `ray`, which joins the cluster at RAY_ADDRESS or else starts Ray
on this machine. Every node sees the project's folder under the same path. Tasks are given paths and little else, and
leave what they make in files, shards, which may lie elsewhere (`core.shards`): no arrays go through Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import cache, lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from img2prompt.core import process, shards
from img2prompt.core.progress import progress
from img2prompt.core.storage import Results, digest, grow, whole

if TYPE_CHECKING:
    from ray import ObjectRef

ENGINES = ("local", "ray")
RETRIES = 5  # times that a piece is begun again after its worker or its node was lost
LIBRARIES = (
    "numpy", "scipy", "torch", "torchvision", "timm", "open_clip_torch", "transformers", "tokenizers", "pillow",
)  # fmt: skip
# What libraries choose their kernels by; others differ between machines of one kind.
FLAGS = ("sse", "ssse", "avx", "amx", "fma", "f16c", "asimd", "sve", "bf16", "i8mm")
ROWS = 1024  # of a shard, about: a lost worker's last ones are computed again, and each shard is a task
STORE = 2**27  # bytes of Ray's object store where it is started here: what goes through it are paths and prompts


class Piece(NamedTuple):
    """Some work that leaves one file or folder."""

    name: str  # by which a failure is told
    make: Callable[[Path], object]  # writes to a path that is not there yet; for Ray, what pickle takes
    file: Path  # what that is renamed to when it is whole: a shard, by its name
    size: int = 1  # in the units of progress


def engine() -> str:
    """Which of ENGINES runs the work.

    Raises:
        ValueError: IMG2PROMPT_ENGINE names none.
    """
    name = os.environ.get("IMG2PROMPT_ENGINE") or ENGINES[0]
    if name not in ENGINES:
        raise ValueError(f"IMG2PROMPT_ENGINE: {name!r} is no engine; choose from {', '.join(ENGINES)}")
    return name


def run(pieces: Iterable[Piece], what: str | None, unit: str = "piece", gpu: bool = False) -> Iterator[str]:
    """Make what is not there yet of the pieces' files; yield the SHA-256 of each in order, once it is whole.

    Whole files of a killed run are not made again.

    Args:
        pieces: in any number, asked for one by one; on a cluster twice as many as run at once are ahead of the yields.
        what: labels the progress bar over all workers; None: the caller has one. There is none in this process, where
            each piece may have its own.
        unit: of the pieces' sizes.
        gpu: a task of Ray has a GPU of its own. It always has as many cores as `process.threads` says.

    Raises:
        ValueError, OSError: a piece raised it; then, or where its worker was lost again and again, Ray's names the
            piece and the node. Or no node has the cores or the GPU of a task, or a node's processor or libraries are
            not this machine's.
    """
    if engine() == "ray":
        yield from _by_ray(pieces, what, unit, gpu)
        return
    for piece in pieces:
        yield _made(piece)


def grown(
    folder: Path,
    batches: Sequence[Sized],
    results: Results,
    what: str,
    unit: str,
    gpu: bool = False,
) -> dict[str, Path]:
    """Arrays of rows, as `storage.grow` has them, from shards that workers leave in a folder within `folder`.

    In this process there are no shards: the files themselves grow. Ray's are appended in order, and removed when what
    has grown is safe, so that they take little space beside it.

    Args:
        folder: as for `grow`.
        batches: as for `grow`; for Ray small ones, such as paths, that pickle takes.
        results: as for `grow`, arrays alone. Pickle takes it, with its models as what they are loaded from, which
            each worker does once.
        what: labels the progress bar over all workers.
        unit: of the rows.
        gpu: see `run`.

    Returns:
        The finished files by name.

    Raises:
        ValueError, OSError: as `run`.
    """
    if engine() == "local":
        return grow(folder, batches, results)
    # The same shards whatever is left of the batches, so that a resumed run finds what is there.
    ends = np.cumsum([0, *map(len, batches)])
    cuts = np.unique(np.searchsorted(ends, [*range(0, int(ends[-1]), ROWS), int(ends[-1])])).tolist()
    files, pickled = folder / "shards", _ray().cloudpickle.dumps(results)  # it takes what a stage's script defines
    appended: deque[tuple[int, Path]] = deque()  # and not yet removed, by the number of their last batch

    def shards_of(left: Sequence[Sized]) -> Iterator[dict[str, np.ndarray]]:
        start = len(batches) - len(left)
        spans = [(first, last) for first, last in pairwise(cuts) if last > start]
        pieces = [
            Piece(
                f"{what}, {unit}s {ends[first]} to {ends[last] - 1}",
                partial(_shard, str(folder), pickled, batches[first:last]),
                files / f"{first:09d}-{last:09d}.safetensors",
                int(ends[last] - ends[first]),
            )
            for first, last in spans
        ]
        for (first, last), piece, sha in zip(spans, pieces, run(pieces, what, unit, gpu), strict=True):
            with shards.fetched(piece.file) as file:
                if digest(file) != sha:
                    raise OSError(f"{piece.file}: not what its worker wrote; is the folder the same one on all nodes?")
                arrays = load_file(file)
            appended.append((last, piece.file))
            for batch in range(max(first, start), last):
                own = slice(ends[batch] - ends[first], ends[batch + 1] - ends[first])
                yield {name: array[own] for name, array in arrays.items()}

    def saved(done: int) -> None:
        while appended and appended[0][0] <= done:
            shards.forget(appended.popleft()[1])

    found = grow(folder, batches, shards_of, saved=saved)
    shards.forget(files)
    return found


def _shard(folder: str, results: bytes, batches: Sequence[Sized], path: Path) -> None:
    """Write the arrays of some batches, one batch behind the other, as safetensors."""
    found: dict[str, list[np.ndarray]] = {}
    for result in _unpickled(str(Path.cwd()), folder, results)(batches):
        for name, array in result.items():
            found.setdefault(name, []).append(array)
    # safetensors takes an array's memory as it lies, which of a tower with channels last is in another order.
    save_file({name: np.ascontiguousarray(np.concatenate(arrays)) for name, arrays in found.items()}, path)


@lru_cache(maxsize=1)
def _unpickled(_root: str, _folder: str, results: bytes) -> Results:
    """Once a process; the folder is another where the models that are loaded are others."""
    return _ray().cloudpickle.loads(results)


def _by_ray(pieces: Iterable[Piece], what: str | None, unit: str, gpu: bool) -> Iterator[str]:
    ray, cores = _joined(), process.threads()
    variables = process.variables() | {
        "IMG2PROMPT_THREADS": str(cores),
        "IMG2PROMPT_DEVICE": "cuda" if gpu else "cpu",
        "IMG2PROMPT_ENGINE": "local",  # a task starts no tasks
        "IMG2PROMPT_SHARDS": shards.root(),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # workers import what this process would
    }
    options = {"num_cpus": cores, "num_gpus": int(gpu), "max_retries": RETRIES}
    task = ray.remote(**options, runtime_env={"env_vars": variables})(_task)

    def slots() -> int:
        """How many tasks run at once on the nodes that are there now."""
        has = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        each = [(node.get("CPU", 0) // cores, node.get("GPU", 0) if gpu else np.inf) for node in has]
        return int(sum(map(min, each)))

    if not slots():
        raise ValueError(
            f"IMG2PROMPT_THREADS: a task wants {cores} cores{' and a GPU' * gpu}, which no node of the cluster has; "
            "set it to what they have, or less"
        )
    coming, root, about = iter(pieces), str(Path.cwd()), _about(gpu)
    order: deque[Piece] = deque()
    running: dict[ObjectRef, Piece] = {}
    digests: dict[Path, str] = {}
    total = sum(piece.size for piece in pieces) if isinstance(pieces, Sequence) else None
    with progress(None, what or "", total, unit, quiet=what is None) as bar:
        try:
            while True:
                while len(order) < 2 * max(slots(), 1) and (piece := next(coming, None)):
                    order.append(piece)
                    if shards.there(piece.file):
                        digests[piece.file] = _made(piece)
                        bar.update(piece.size)
                    else:
                        running[task.remote(root, about, gpu, piece)] = piece
                if not order:
                    return
                if order[0].file not in digests:
                    for ref in ray.wait(list(running))[0]:
                        digests[running[ref].file] = _answer(ray, ref, running[ref])
                        bar.update(running.pop(ref).size)
                while order and order[0].file in digests:
                    yield digests.pop(order.popleft().file)
        finally:  # of an error, Ctrl-C, or whoever asks for no more
            for ref in running:
                ray.cancel(ref, force=True)


def _answer(ray: ModuleType, ref: ObjectRef, piece: Piece) -> str:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise  # a defect of ours: with where it was
    except ray.exceptions.RayError as error:
        raise OSError(f"{piece.name}: begun {RETRIES + 1} times, and its worker lost each time: {error}") from None


def _ray() -> ModuleType:
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("IMG2PROMPT_ENGINE: Ray is not here; pip install -r requirements-ray.txt") from None
    return ray


def _joined() -> ModuleType:
    """Ray, with the cluster joined or started."""
    ray, address = _ray(), os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
        own = {} if address else {"include_dashboard": False, "object_store_memory": STORE}
        try:
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except ConnectionError as error:
            raise OSError(f"RAY_ADDRESS: no cluster at {address}: {error}; `ray start --head` starts one") from None
    return ray


def _task(root: str, driver: dict[str, str], gpu: bool, piece: Piece) -> str:
    """In a worker: make a piece's file, if it is not there; its SHA-256."""
    os.chdir(root)
    process.settle()
    node = _ray().get_runtime_context().get_node_id()[:8]
    where = f"node {node} ({socket.gethostname()})"
    if differences := _differences(driver, _about(gpu)):
        raise ValueError(
            f"{where} computes other bytes than the machine where the command runs: {differences}; install the same "
            "libraries there, or take it out of the cluster with `ray stop`"
        )
    try:
        return _made(piece, f".{node}-{os.getpid()}")
    except (ValueError, OSError) as error:
        raise ValueError(f"{piece.name}, on {where}: {error}") from None


def _made(piece: Piece, mark: str = "") -> str:
    """Make a piece's file, if it is not there; its SHA-256.

    mark: ends the name of what is not its file yet: a worker that is taken for lost may still write beside the one that
    makes it again.
    """
    file = shards.folder(piece.file)
    if not shards.there(piece.file) and file is None:
        with TemporaryDirectory() as aside:
            own = Path(aside) / piece.file.name
            piece.make(own)
            shards.sent(own, piece.file)
            return digest(own)
    if not shards.there(piece.file):
        own = file.with_name(f"{file.name}{mark}")
        with whole(own) as aside:
            piece.make(aside)
        try:
            own.replace(file)
        except OSError:
            if not file.is_dir():
                raise
            shutil.rmtree(own)  # the other one was first
    with shards.fetched(piece.file) as found:
        return digest(found)


@cache
def _about(gpu: bool) -> dict[str, str]:
    """What the last digits of a result depend on: versions, and what of the processor libraries ask for."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else [f"flags: {platform.processor()}"]
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    found |= {f"processor flag {flag}": "yes" for flag in flags.split() if flag.startswith(FLAGS)}
    if gpu:
        import torch  # takes seconds

        from img2prompt.core.device import device

        found["GPU"] = torch.cuda.get_device_name(device())  # which also asks for kernels that repeat
    return found


def _differences(here: dict[str, str], there: dict[str, str]) -> str:
    """What differs, in words; empty where nothing does."""
    names = sorted(name for name in here | there if here.get(name) != there.get(name))
    said = [f"{name} {there.get(name, 'missing')} and not {here.get(name, 'missing')}" for name in names]
    return ", ".join(said[:5]) + f" and {len(said) - 5} more" * (len(said) > 5)
