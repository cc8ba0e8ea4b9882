"""The process of a stage or a command: its threads, the lock on outputs/, its errors, and its end with its parent."""

from __future__ import annotations

import contextlib
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

LIBRARIES = ("numpy", "pandas", "scipy", "sklearn", "torch", "open_clip", "sentence_transformers")
RECORD = Path("outputs/run.js")  # ignored by git, no stage's output: what differs from run to run of the same inputs


def threads() -> int:
    """How many threads or workers to use: IMG2PROMPT_THREADS, or all cores."""
    return int(os.environ.get("IMG2PROMPT_THREADS") or os.cpu_count() or 1)


def settle() -> None:
    """Set the environment variables that numpy and torch read on import; call it before they are imported.

    Floating-point sums depend on the number of threads, so it is set here and not left to what a shell happens to
    export. IMG2PROMPT_THREADS overrides the number of cores, for machines that are shared.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        os.environ[name] = str(threads())
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic CUDA matrix products
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers' threads and forked workers do not mix
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # no network call on import


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
    found = {"name": name, "seconds": round(seconds, 1), "peak_gb": round(peak, 2)}
    found |= {"commit": _commit(), "versions": versions}
    start = f'stage({{"name": {json.dumps(name)},'
    lines = RECORD.read_text(encoding="utf-8").splitlines() if RECORD.is_file() else []
    lines = [line for line in lines if not line.startswith(start)]
    with whole(RECORD) as path:
        path.write_text("\n".join([*lines, f"stage({json.dumps(found)});", ""]), encoding="utf-8")


def _commit() -> str:
    """The commit of the current folder, and whether its files differ; DVC's lock file does not count."""
    try:
        asked = ("git", "rev-parse", "--short=10", "HEAD"), ("git", "diff", "--name-only", "HEAD", "--", ":!dvc.lock")
        commit, changed = (subprocess.run(ask, capture_output=True, text=True, check=True).stdout for ask in asked)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + (" with changes" if changed else "")


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
