"""What all benchmarks share: how a stage says what it does and how else it is done, and one run of one of these ways.

A run is a process of its own, so that its peak memory is its own. What it works on is made once, in files. It is
loaded, with libraries and models, and a small run is made before the clock starts.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from img2prompt.core import device
from img2prompt.core.metric import cosine

OURS = "ours"
FP32 = "ours, fp32"  # the same as on a processor without bfloat16


class Work(NamedTuple):
    """The least that a task asks of a machine."""

    operations: float = 0.0  # of matrix products: two for each multiplication
    copied: float = 0.0  # bytes
    written: float = 0.0  # bytes


class Limits(NamedTuple):
    """What a machine does in a second; `bfloat16` is 0 where it has none."""

    float32: float  # operations of a matrix product
    bfloat16: float
    copied: float  # bytes
    written: float  # bytes, to a file

    def seconds(self, work: Work, bfloat16: bool) -> float:
        """What it needs for a task at least, its products in one precision or the other."""
        product = self.bfloat16 if bfloat16 else self.float32
        return work.operations / product + work.copied / self.copied + work.written / self.written


@dataclass(frozen=True)
class Task:
    """One thing that a stage does, and the ways to do it.

    name: the stage's, with what it does behind a colon where it does several things. make: puts the inputs of so many
    rows into an empty folder. load: those of the first so many rows, which a variant is called with. variants: by name,
    `ours` first. check: of a variant's result and the folder: `yes` where it is what it should be, else by how much it
    is not. growth: the power of the rows that the seconds grow with, of the whole "" or of `parts`. most: the rows that
    are run at most. warm: rows of the small run before. by_flag: the variants in bfloat16 where the processor has it.
    parts: the seconds of a result's parts by name.
    """

    name: str
    make: Callable[[Path, int], Work]
    load: Callable[[Path, int], Sequence[Any]]
    variants: Mapping[str, Callable[..., Any]]
    check: Callable[[Any, Path], str]
    growth: Mapping[str, float]
    most: int | None = None
    warm: int = 1000
    by_flag: Collection[str] = ()
    parts: Callable[[Any], dict[str, float]] = field(default=lambda _: {})

    @property
    def runs(self) -> list[str]:
        """The variants' names, with ours in float32 where ours is in bfloat16 here."""
        names = list(self.variants)
        return [OURS, FP32, *names[1:]] if OURS in self.by_flag and device.has_bfloat16("cpu") else names


def tasks(stage: str) -> dict[str, Task]:
    """The tasks of a stage's file by name."""
    return {task.name: task for task in importlib.import_module(f"bench.{stage}").TASKS}


def alone(function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), _silent) as process:
        return process.submit(function, *arguments).result()


def _silent() -> None:
    """Show no progress of what is measured."""
    sys.stdout = sys.stderr = io.StringIO()


def make(stage: str, name: str, folder: Path, rows: int) -> Work:
    """Make a task's inputs."""
    folder.mkdir(parents=True)
    return tasks(stage)[name].make(folder, rows)


def measure(stage: str, name: str, variant: str, folder: Path, rows: int, checked: bool) -> dict[str, Any]:
    """Run a variant: `seconds`, of the whole "" and of parts by name; `peak_mb`; and `identical`, if `checked`.

    peak_mb: the highest resident memory, above what was resident before.
    """
    if not variant.startswith(OURS):
        os.environ.pop("TOKENIZERS_PARALLELISM", None)  # others leave it on
    if variant == FP32:
        _without_bfloat16()
    task = tasks(stage)[name]
    run = task.variants[OURS if variant == FP32 else variant]
    if task.warm:
        run(*task.load(folder, min(rows, task.warm)))
    inputs = task.load(folder, rows)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before, start = _peak_mb(), time.perf_counter()
    found = run(*inputs)
    seconds, peak = time.perf_counter() - start, _peak_mb()
    said = task.check(found, folder) if checked else ""
    return {"seconds": {"": seconds, **task.parts(found)}, "peak_mb": peak - before, "identical": said}


def _without_bfloat16() -> None:
    """Make every module that knows `has_bfloat16` find that there is none."""
    has = device.has_bfloat16
    for module in list(sys.modules.values()):
        if vars(module).get("has_bfloat16") is has:
            module.has_bfloat16 = lambda _: False


def _peak_mb() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


def limits(folder: Path) -> Limits:
    """The best of several products of 4096 x 4096 matrices, copies of 256 MB, and writes of 256 MB into a folder."""
    side, size = 4096, 2**28
    a, b = torch.randn(2, side, side)
    source, target, file = np.ones(size, np.uint8), np.empty(size, np.uint8), folder / "written"

    def best(act: Callable[[], Any]) -> float:
        act()
        times = []
        for _ in range(4):
            start = time.perf_counter()
            act()
            times.append(time.perf_counter() - start)
        return min(times)

    def product(dtype: torch.dtype) -> float:
        x, y = a.to(dtype), b.to(dtype)
        out = torch.empty(side, side, dtype=dtype)
        return 2 * side**3 / best(lambda: torch.mm(x, y, out=out))

    found = Limits(
        product(torch.float32),
        product(torch.bfloat16) if device.has_bfloat16("cpu") else 0.0,
        size / best(lambda: np.copyto(target, source)),
        size / best(lambda: file.write_bytes(source)),
    )
    file.unlink()
    return found


def deviation(off: np.ndarray | float) -> str:
    """The largest of deviations as `identical`."""
    largest = float(np.max(np.abs(off)))
    return f"{largest:.0e}" if largest else "yes"


def from_right(found: np.ndarray, right: np.ndarray) -> str:
    """How far the first vectors' directions are from what is right, by 1 minus the cosine, as `identical`."""
    return deviation(1 - cosine(found[: len(right)].astype(np.float64), right[: len(found)].astype(np.float64)))
