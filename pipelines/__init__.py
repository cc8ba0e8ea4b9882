"""The stages of dvc.yaml, one script each; here is what every stage's process shares."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

# A copy of the project (`dvc exp run --temp`, a worktree) must run its own library.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

# Sums depend on the number of threads: it is set here, before numpy and torch read it, and not left to
# what a shell happens to export. IMG2PROMPT_THREADS is for machines that are shared.
THREADS = int(os.environ.get("IMG2PROMPT_THREADS") or os.cpu_count() or 1)
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ[_name] = str(THREADS)
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic CUDA matrix products
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers' threads and forked workers do not mix
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # no network call on import

if TYPE_CHECKING:
    from img2prompt.params import Params


def run(stage: Callable[[Params], None]) -> None:
    """Run one stage: check params.yaml, wait for any other stage's process, report time and peak memory."""
    from img2prompt.params import load_params

    try:
        params = load_params()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    gc.enable()
    gc.freeze()  # what is imported stays to the end, and then need not be taken apart
    name = Path(sys.argv[0]).stem
    if WATCH.ident is None:
        WATCH.start()
    Path("outputs").mkdir(exist_ok=True)
    start = time.monotonic()
    with Path("outputs/.lock").open("w") as lock:
        # A stage outlives a killed `dvc` by a moment; the next one must not write beside it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            stage(params)
        except (ValueError, OSError) as error:
            if os.environ.get("IMG2PROMPT_DEBUG"):
                raise
            sys.exit(f"error in {name}: {error}\n(IMG2PROMPT_DEBUG=1 shows where)")
        except KeyboardInterrupt:
            print(f"{name}: interrupted; `dvc repro` goes on from here", file=sys.stderr)
            sys.exit(130)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"{name}: {time.monotonic() - start:.0f} s, peak {peak / 2**20:.2f} GB", flush=True)


def _parents() -> list[int]:
    """The process that started this one, and where that is only a shell between, the one that started the shell."""
    parent = psutil.Process().parent()
    if parent is None:
        return []
    with contextlib.suppress(psutil.Error):
        if parent.name().endswith("sh") and "-c" in parent.cmdline():
            return [parent.pid, parent.ppid()]
    return [parent.pid]


PARENTS = _parents()


def _orphaned() -> bool:
    """Whether dvc is gone; also if it went before this process could look: then its parent is in another group."""
    parents = _parents()
    try:
        strangers = any(os.getpgid(pid) != os.getpgrp() for pid in parents)
    except ProcessLookupError:
        return True
    return parents != PARENTS or ("DVC_STAGE" in os.environ and strangers)


def _die_with_parents() -> None:
    """End this process when dvc is gone: nobody else would, and the next `dvc repro` starts the stage again."""
    while not _orphaned():
        time.sleep(0.5)
    os._exit(1)


WATCH = threading.Thread(target=_die_with_parents, daemon=True)
if sys.argv[0] == "-m":  # `python -m pipelines.STAGE`: its imports take seconds, and dvc may be killed meanwhile
    WATCH.start()
    gc.disable()  # none of what imports make is garbage; looking for it took a fifth of their time
