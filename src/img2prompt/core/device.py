"""The torch device, its mixed precision, and copies to and from it that nothing waits for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
_float32_only = ContextVar("float32_only", default=False)


def device() -> str:
    """The torch device to use: CUDA where it is, else the CPU, unless the variable IMG2PROMPT_DEVICE names another.

    On CUDA kernels are used of which the same inputs give the same bytes, where there are such; others warn.

    Raises:
        ValueError: the variable names a device that is not here.
    """
    here = ["cpu", *["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available()]
    name = os.environ.get("IMG2PROMPT_DEVICE") or ("cuda" if "cuda" in here else "cpu")
    if name.partition(":")[0] not in here:
        raise ValueError(f"IMG2PROMPT_DEVICE: {name!r} is not here; choose from {', '.join(here)}")
    if name != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        # Of the fused kernels for attention, flash alone has gradients that repeat, if it is asked for them.
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return name


def on_cuda(device: str) -> bool:
    """Whether the device is a CUDA GPU."""
    return torch.device(device).type == "cuda"


def has_bfloat16(device: str | torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16, several times as fast as in float32: by its flags.

    A CPU does so with AMX or AVX512-BF16; one that has neither takes a hundred times as long. It is never timed, for
    results may depend on it. No CPU does so within `float32_only`.
    """
    if torch.device(device).type == "cpu":
        if _float32_only.get():
            return False
        flags = torch.cpu.get_capabilities()
        return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))
    return on_cuda(device) and torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def float32_only() -> Iterator[None]:
    """What is made within it uses no bfloat16 on a CPU: for comparisons that are finer than its rounding."""
    before = _float32_only.set(True)
    try:
        yield
    finally:
        _float32_only.reset(before)


def half_precision(device: str) -> torch.dtype:
    """What mixed precision computes in: bfloat16, which needs no loss scaling, and float16 on cards before Ampere."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


def autocast(device: str, dtype: torch.dtype | None = None) -> torch.autocast:
    """Mixed precision on CUDA, in `dtype` or `half_precision`; elsewhere none: CPUs have `half_products`."""
    return torch.autocast("cuda", dtype or half_precision(device), enabled=on_cuda(device))


@contextmanager
def half_products(device: str | torch.device) -> Iterator[None]:
    """In the block, a CPU that `has_bfloat16` multiplies float32 matrices in it; sums and results stay float32."""
    before = torch.get_float32_matmul_precision()
    if torch.device(device).type == "cpu" and has_bfloat16(device):
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in order; a thread gets the next one while one is worked on, and its errors are raised here."""
    asked, answers, end = SimpleQueue(), SimpleQueue(), object()

    def answer() -> None:
        coming = iter(items)
        while asked.get():
            try:
                answers.put((next(coming, end), None))
            except BaseException as error:
                answers.put((end, error))

    # Not an executor's thread: processes that are forked from one, as those that read images, end with an error.
    reader = Thread(target=answer, daemon=True)
    reader.start()
    try:
        asked.put(True)
        while True:
            item, error = answers.get()
            if error:
                raise error
            if item is end:
                return
            asked.put(True)
            yield item
    finally:
        asked.put(False)
        reader.join()


def onto(batches: Iterable[Tensor], device: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """The batches in order, on the device, in float32.

    CUDA gets the next one while one is worked on: another thread reads it and copies it, as `dtype` or as it is.
    """
    if not on_cuda(device):
        for x in batches:
            yield x.to(device, torch.float32)
        return
    side = torch.cuda.Stream(device)

    def copies() -> Iterator[tuple[Tensor, torch.cuda.Event]]:
        for x in batches:
            pinned = torch.empty(x.shape, dtype=dtype or x.dtype, pin_memory=True).copy_(x)
            with torch.cuda.stream(side):
                there = pinned.to(device, non_blocking=True)
                copied = side.record_event()
            yield there, copied

    for x, copied in ahead(copies()):
        stream = torch.cuda.current_stream(device)
        stream.wait_event(copied)
        x.record_stream(stream)
        yield x.float()


def off(results: Iterable[Mapping[str, Tensor]], device: str) -> Iterator[dict[str, Tensor]]:
    """The results in order, on the CPU; from CUDA each is copied while the next one is computed."""
    if not on_cuda(device):
        for found in results:
            yield {name: value.cpu() for name, value in found.items()}
        return
    side = torch.cuda.Stream(device)
    before: tuple[dict[str, Tensor], torch.cuda.Event] | None = None
    for found in results:
        side.wait_stream(torch.cuda.current_stream(device))
        pinned = {name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True) for name, value in found.items()}
        with torch.cuda.stream(side):
            for name, value in found.items():
                pinned[name].copy_(value, non_blocking=True)
                value.record_stream(side)
        if before:
            before[1].synchronize()
            yield before[0]
        before = pinned, side.record_event()
    if before:
        before[1].synchronize()
        yield before[0]


def tile(device: str | torch.device, on_cpu: tuple[int, int]) -> tuple[int, int]:
    """How many rows are compared with how many at once: on the CPU as its caches like it, elsewhere to keep it busy."""
    return on_cpu if torch.device(device).type == "cpu" else (8192, 65_536)  # 2 GB of float32
