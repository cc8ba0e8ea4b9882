"""Kill the pipeline at random moments in every stage, go on each time, and compare what comes out, byte for byte.

    python bench/kill.py --kills 25 CLONE

CLONE is a clone of the project with its environment's `dvc` and `python` first in PATH, and with params.yaml as it
shall run. It runs twice: once undisturbed, from an empty cache, and once killed. In turn the whole process group gets
SIGKILL, dvc alone SIGKILL, the group SIGTERM, dvc alone SIGTERM, the group SIGINT. The moments are drawn from the
undisturbed run's stages in turn, so that every stage is hit. After each kill the declared outputs must be absent or
whole, and while the next run lasts no two processes of the project's stages may write at once.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

KILLS = [
    ("group", signal.SIGKILL), ("dvc", signal.SIGKILL), ("group", signal.SIGTERM), ("dvc", signal.SIGTERM),
    ("group", signal.SIGINT),
]  # fmt: skip


def repro(home: Path, log: Path) -> subprocess.Popen:
    """Start `dvc repro` as the leader of a process group of its own, as a terminal does."""
    with log.open("ab") as file:
        return subprocess.Popen(["dvc", "repro"], cwd=home, stdout=file, stderr=file, process_group=0)


def stages(home: Path) -> list[psutil.Process]:
    """The processes that run a stage of the clone, without their workers."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            ours = "-m" in command and "-c" not in command and any(part.startswith("pipelines.") for part in command)
            if ours and Path(process.cwd()) == home and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def name(process: psutil.Process) -> str:
    try:
        command = process.cmdline()
        return " ".join(command[command.index("-m") + 1 :]).removeprefix("pipelines.")
    except (psutil.Error, ValueError):
        return ""


def writing(processes: list[psutil.Process], home: Path) -> int:
    """How many of them hold the lock under which outputs are written."""
    inode = (home / "outputs/.lock").stat().st_ino if (home / "outputs/.lock").exists() else -1
    held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    pids = {int(parts[4]) for parts in held if parts[1] == "FLOCK" and int(parts[5].split(":")[2]) == inode}
    return len(pids & {process.pid for process in processes})


def contents(home: Path) -> dict[str, dict[str, str]]:
    """Digests of the files of every output that a stage declares and that is there."""
    outputs = home / "outputs"
    found = {}
    parted = ("embed_prompts", "embed_test", "model_a", "predict")  # declared in parts
    for out in sorted([*outputs.glob("*"), *(part for name in parted for part in outputs.glob(f"{name}/*"))]):
        if out.name in {".resume", ".lock", "run.js", *parted} or out.suffix == ".partial":
            continue
        files = [out] if out.is_file() else [file for file in sorted(out.rglob("*")) if file.is_file()]
        found[str(out.relative_to(outputs))] = {
            str(file.relative_to(outputs)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
        }
    return found


def clear(home: Path) -> None:
    """As in a fresh clone: no outputs, no cache, no runs to take results from."""
    for path in (home / "outputs", home / ".dvc/cache", home / ".dvc/tmp"):
        shutil.rmtree(path, ignore_errors=True)
    subprocess.run(["git", "checkout", "-q", "dvc.lock"], cwd=home, check=False)


def forget(home: Path, names: list[str]) -> None:
    """As if these stages had never run, and the others had."""
    lock = yaml.safe_load((home / "dvc.lock").read_text())
    for name in names:
        lock["stages"].pop(name.replace(" ", "@"), None)
        folder = name.replace("model_a ", "model_a/fold_", 1) if name.startswith("model_a ") else name.replace(" ", "/")
        shutil.rmtree(home / "outputs" / folder, ignore_errors=True)
    (home / "dvc.lock").write_text(yaml.safe_dump(lock))
    shutil.rmtree(home / ".dvc/cache/runs", ignore_errors=True)
    (home / "outputs/submission.csv").unlink(missing_ok=True)


def watch(process: subprocess.Popen, home: Path, until: float | None, seen: dict[str, list[float]]) -> int:
    """Look at the run until it ends or `until` seconds have gone; the most stages that wrote at any one time."""
    start, most = time.monotonic(), 0
    while process.poll() is None and (until is None or time.monotonic() - start < until):
        running = stages(home)
        for stage in filter(None, map(name, running)):
            seen.setdefault(stage, []).append(time.monotonic() - start)
        most = max(most, writing(running, home))
        time.sleep(0.02)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("clone", type=lambda path: Path(path).resolve())
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    home, rng, log = options.clone, random.Random(options.seed), options.clone.with_suffix(".log")
    if shutil.which("dvc") is None:
        sys.exit("dvc is not in PATH: source the environment's bin/activate first")
    log.write_bytes(b"")
    # A shell's background job ignores Ctrl-C, and so would all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    clear(home)
    start, seen = time.monotonic(), {}
    process = repro(home, log)
    watch(process, home, None, seen)
    if process.returncode:
        sys.exit(f"the undisturbed run failed: see {log}")
    whole = contents(home)
    print(f"undisturbed: {time.monotonic() - start:.0f} s, {len(whole)} outputs, seed {options.seed}", flush=True)
    spans = {stage: max(times) - min(times) for stage, times in seen.items()}
    print("  " + ", ".join(f"{stage} {span:.0f} s" for stage, span in spans.items()), flush=True)

    clear(home)
    names, failures, kills = list(spans), 0, 0
    while kills < options.kills:
        # Every stage in turn, in their order, so that all are hit and the run gets on.
        stage = names[kills * len(names) // options.kills]
        moment = rng.uniform(0, spans[stage])
        process, began, most = repro(home, log), time.monotonic(), 0
        while process.poll() is None:
            running = stages(home)
            most = max(most, writing(running, home))
            if any(found in names[names.index(stage) :] for found in map(name, running)):
                break
            time.sleep(0.02)
        most = max(most, watch(process, home, moment, {}))
        if process.poll() is not None:
            same = contents(home) == whole and not process.returncode
            how = "with the same bytes" if same else "with OTHER bytes"
            print(f"    {stage}: the run ended {how} before its kill; again from that stage", flush=True)
            failures += not same
            forget(home, names[names.index(stage) :])
            continue
        hit = " + ".join(map(name, stages(home))) or "dvc between stages"
        target, kind = KILLS[kills % len(KILLS)]
        (os.killpg if target == "group" else os.kill)(process.pid, kind)
        killed = time.monotonic()
        process.wait()
        at_once = len(stages(home))
        while stages(home) and time.monotonic() - killed < 10:
            time.sleep(0.02)
        gone, alive, now = time.monotonic() - killed, len(stages(home)), contents(home)
        broken = [out for out, files in now.items() if files != whole[out]]
        failures += bool(alive or broken or most > 1)
        kills += 1
        print(
            f"{kills:3}  +{moment:5.1f} s in {hit:20} {kind.name} to {target:5}  stages alive when dvc was gone: "
            f"{at_once}, none after {gone:.2f} s; most writing: {most}; outputs whole: {len(now) - len(broken)}, "
            f"other: {broken}; {time.monotonic() - began:.0f} s" + ("  STILL ALIVE" if alive else ""),
            flush=True,
        )
    process = repro(home, log)
    most = watch(process, home, None, {})
    final = contents(home)
    differ = sorted(out for out in whole.keys() | final.keys() if whole.get(out) != final.get(out))
    same = final.get("submission.csv") == whole["submission.csv"]
    print(f"last run: rc {process.returncode}, most writing: {most}; outputs that differ: {differ}")
    print(f"submission.csv {'is byte-identical' if same else 'DIFFERS'} after {kills} kills, seed {options.seed}")
    if process.returncode or differ or failures or most > 1:
        sys.exit(f"failed: {failures} of the kills, see above and {log}")


if __name__ == "__main__":
    main()
