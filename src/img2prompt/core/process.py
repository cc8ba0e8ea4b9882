"""The process of a stage or a command: threads, the lock on outputs/, errors, a record, and its end with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import fcntl
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIBRARIES = ("numpy", "pandas", "scipy", "sklearn", "torch", "open_clip", "sentence_transformers")
RECORD = Path("outputs/run.js")  # ignored by git, no stage's output: what differs from run to run of the same inputs
CHANGED = " with changes"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT = 2**29  # bytes: as much freed memory, or an array so large, goes back to the system
CODE = (":/src", ":/pipelines", ":/dvc.yaml", ":/params.yaml")  # in git's terms: what figures depend on beside the data


def threads() -> int:
    """How many threads or workers to use: IMG2PROMPT_THREADS, or all cores."""
    return int(os.environ.get("IMG2PROMPT_THREADS") or os.cpu_count() or 1)


def variables() -> dict[str, str]:
    """The environment variables that numpy, torch and others read on import.

    Floating-point sums depend on the number of threads, so it is set here and not left to what a shell happens to
    export. IMG2PROMPT_THREADS overrides the number of cores, for machines that are shared.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return dict.fromkeys(names, str(threads())) | {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic CUDA matrix products
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers' threads and forked workers do not mix
        "NO_ALBUMENTATIONS_UPDATE": "1",  # no network call on import
    }


def settle() -> None:
    """Set `variables`, and have memory that is freed stay with the process, up to KEPT.

    Call it before numpy and torch are imported.
    """
    os.environ.update(variables())
    # Of arrays of megabytes glibc gives the memory back and gets it anew, page by page: a third of a tower's time.
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, KEPT)
        mallopt(M_TRIM_THRESHOLD, KEPT)


@contextlib.contextmanager
def turn(name: str, recorded: bool = False) -> Iterator[None]:
    """Run the block once no other process of the project writes to outputs/, and report time and peak memory.

    recorded: they are noted in RECORD too. Ends the process with a short message where the block raises a ValueError or
    an OSError, and with status 130 where it is interrupted.
    """
    gc.enable()
    gc.freeze()  # imported objects stay until the end: the garbage collector need not visit them
    Path("outputs").mkdir(exist_ok=True)
    start = time.monotonic()
    with Path("outputs/.lock").open("w") as lock:
        # A stage outlives a killed `dvc` by a moment; the next one must not write beside it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except (ValueError, OSError) as error:
            if os.environ.get("IMG2PROMPT_DEBUG"):
                raise
            sys.exit(f"error in {name}: {error}\n(IMG2PROMPT_DEBUG=1 shows where)")
        except KeyboardInterrupt:
            print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(130)
        seconds = time.monotonic() - start
        peak = (
            max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
        )
        if recorded:
            _record(name, seconds, peak)
    print(f"{name}: {seconds:.0f} s, peak {peak:.2f} GB", flush=True)


def _record(name: str, seconds: float, peak: float) -> None:
    """Put a stage's line, `stage({...});`, in RECORD in place of its earlier one."""
    from img2prompt.core.storage import whole  # imports numpy, before which `settle` has to be called

    loaded = ((module, getattr(sys.modules.get(module), "__version__", None)) for module in LIBRARIES)
    versions = {"python": platform.python_version()} | {module: str(version) for module, version in loaded if version}
    found = {"name": name, "seconds": round(seconds, 1), "peak_gb": round(peak, 2), **made(), "versions": versions}
    others = [record for record in records() if record["name"] != name]
    with whole(RECORD) as path:
        lines = [f"stage({json.dumps(record)});\n" for record in (*others, found)]
        path.write_text("".join(lines), encoding="utf-8")


def records(path: Path = RECORD) -> list[dict[str, Any]]:
    """What stages have noted of their last runs, in the order of these: `name`, `seconds`, `peak_gb`, `versions`, and
    what `made` says. Empty where there is no such file.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line.removeprefix("stage(").removesuffix(");")) for line in lines]


def made() -> dict[str, str]:
    """How figures are made here and now: the `commit` of the code, the `processor`, the `date`."""
    return {"commit": commit(), "processor": processor(), "date": datetime.date.today().isoformat()}


def commit(folder: Path = Path(__file__).parent) -> str:
    """The last commit in the history of `folder` that changed CODE, with a note where files of CODE differ from it."""
    asked = ("log", "-1", "--abbrev=10", "--format=%h", "--", *CODE), ("status", "--porcelain", "--", *CODE)
    try:
        found = [
            subprocess.run(["git", "-C", folder, *ask], capture_output=True, text=True, check=True).stdout.strip()
            for ask in asked
        ]
    except (OSError, subprocess.CalledProcessError):
        found = ["", ""]
    return (found[0] or "unknown") + CHANGED * bool(found[1])


def processor() -> str:
    """The name of the GPU that this process has used, else of the CPU."""
    torch, about = sys.modules.get("torch"), Path("/proc/cpuinfo")
    if torch and torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


class Watch(threading.Thread):
    """A thread that ends this process when its parent is gone: otherwise the stage would go on, and the next
    `dvc repro` would start it again.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._parents = _parents()

    def attend(self) -> None:
        """Start, and collect no garbage until the `turn` comes; a second call does nothing.

        A stage's imports take seconds: dvc may be killed meanwhile, and looking for garbage took a fifth of their time.
        """
        if self.ident is None:
            self.start()
            gc.disable()

    def run(self) -> None:
        """Check twice a second whether the parent is gone."""
        while not self._orphaned():
            time.sleep(0.5)
        os._exit(1)

    def _orphaned(self) -> bool:
        """Whether dvc is gone, even if it ended before the first check: then the parent is in another process group."""
        parents = _parents()
        try:
            strangers = any(os.getpgid(pid) != os.getpgrp() for pid in parents)
        except ProcessLookupError:
            return True
        return parents != self._parents or ("DVC_STAGE" in os.environ and strangers)


def _parents() -> list[int]:
    """The id of the parent process and, where that is only a shell in between, also of the shell's parent."""
    import psutil  # only stages need it

    parent = psutil.Process().parent()
    if parent is None:
        return []
    with contextlib.suppress(psutil.Error):
        if parent.name().endswith("sh") and "-c" in parent.cmdline():
            return [parent.pid, parent.ppid()]
    return [parent.pid]
