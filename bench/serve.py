"""`img2prompt serve` under load: its rate against `img2prompt predict`, its memory, and more clients than it can take.

    python bench/serve.py                     # where the pipeline has run: on outputs/ and its test images
    python bench/serve.py --seconds 20 --clients 4

First `predict` answers images with words and without, without the time of loading the model. Then a server runs, and
clients on this machine each send one image after another: requests a second, quantiles of the time of an answer, what
was not answered with 200, and the server's resident memory over the last half. Then many clients send one image each
at once, and then 10 MB each: how many are answered, how many told to come again (503), whether any waits in vain, the
most memory, and how long one image takes right after.
"""

import argparse
import http.client
import io
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from img2prompt.core import process

process.settle()

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from PIL import Image  # noqa: E402

from img2prompt import Predictor  # noqa: E402
from img2prompt.cli.main import main as img2prompt  # noqa: E402
from img2prompt.core.images import read_image  # noqa: E402

COMMAND = [sys.executable, "-c", "from img2prompt.cli.main import main; main()", "serve", "--port", "0"]
PATIENCE = 120  # seconds after which an answer is taken not to come


def command(images: list[bytes], *options: str) -> float:
    """Images a second of `predict` with a model that is loaded."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        paths = [Path(folder) / f"{number:04d}.png" for number in range(len(images))]
        for path, data in zip(paths, images, strict=True):
            path.write_bytes(data)
        start = time.perf_counter()
        img2prompt(["predict", *map(str, paths), "--output", f"{folder}/out.jsonl", *options])
        return len(images) / (time.perf_counter() - start)


def rates(bundle: Path, images: list[bytes]) -> dict[str, float]:
    """Images a second of the command, without words and with them."""
    predictor, load = Predictor.load(bundle), Predictor.load
    Predictor.load = classmethod(lambda *_: predictor)  # the command takes the one that is loaded
    try:
        command(images[:8])
        return {"predict --no-words": command(images, "--no-words"), "predict": command(images)}
    finally:
        Predictor.load = load


class Client:
    """A connection that is kept, and what came of its requests."""

    def __init__(self, port: int) -> None:
        self._link = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.statuses: Counter[int | str] = Counter()
        self.seconds: list[float] = []

    def ask(self, data: bytes) -> None:
        """Send an image, and wait for what comes."""
        start = time.perf_counter()
        try:
            self._link.request("POST", "/predict", data, {"Content-Type": "image/png"})
            answer = self._link.getresponse()
            answer.read()
            self.statuses[answer.status] += 1
        except OSError as error:
            self.statuses[type(error).__name__] += 1
            self._link.close()
        self.seconds.append(time.perf_counter() - start)


def at_once(clients: list[Client], work: Callable[[int, Client], None], server: psutil.Process) -> "Outcome":
    """Let all clients work beside each other."""
    done, memory = threading.Event(), []

    def watch() -> None:
        while not done.wait(0.5):
            memory.append(server.memory_info().rss / 2**20)

    threads = [threading.Thread(target=work, args=item) for item in enumerate(clients)]
    start = time.perf_counter()
    for thread in (watching := threading.Thread(target=watch), *threads):
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    done.set()
    watching.join()
    statuses = sum((client.statuses for client in clients), Counter())
    return Outcome(took, sorted(second for client in clients for second in client.seconds), dict(statuses), memory)


@dataclass(frozen=True)
class Outcome:
    """took: seconds in all. seconds: of every answer, sorted. memory: of the server, in MB, twice a second."""

    took: float
    seconds: list[float]
    statuses: dict[int | str, int]
    memory: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("outputs"))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--crowd", type=int, default=200, help="clients that come at once")
    parser.add_argument("--images", type=int, default=128, help="that `predict` answers")
    args = parser.parse_args()
    references = pq.read_table("outputs/prepare_test/test.parquet")["image"].drop_null().to_pylist()
    images = [read_image(reference) for reference in references[: args.images]]
    alone = rates(args.bundle, images)
    print(f"load of this machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {process.threads()} threads used")
    for name, rate in alone.items():
        print(f"{name:18} {rate:6.1f} images a second")
    running = subprocess.Popen([*COMMAND, "--bundle", str(args.bundle)], stdout=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r":(\d+)/", running.stdout.readline())[1])
        measure(port, psutil.Process(running.pid), images, alone, args)
    finally:
        running.terminate()
        print(f"told to end, it ended with status {running.wait(PATIENCE)}")


def measure(
    port: int, server: psutil.Process, images: list[bytes], alone: dict[str, float], args: argparse.Namespace
) -> None:
    Client(port).ask(images[0])
    end = time.perf_counter() + args.seconds

    def steadily(number: int, client: Client) -> None:
        while time.perf_counter() < end:
            client.ask(images[(number * 7 + len(client.seconds)) % len(images)])

    found = at_once([Client(port) for _ in range(args.clients)], steadily, server)
    rate, last = len(found.seconds) / found.took, found.memory[len(found.memory) // 2 :]
    shares = " and ".join(f"{rate / other:.0%} of {name}" for name, other in alone.items())
    print(f"{args.clients} clients, {found.took:.0f} s: {rate:.1f} requests a second, {shares}; {found.statuses}")
    middle, most = found.seconds[len(found.seconds) // 2], found.seconds[int(0.95 * len(found.seconds))]
    print(f"  an answer takes {middle:.2f} s, 95 of 100 at most {most:.2f} s, the slowest {found.seconds[-1]:.2f} s")
    slope = np.polyfit(np.arange(len(last)) / 120, last, 1)[0]
    print(f"  memory over the last half: {min(last):.0f} to {max(last):.0f} MB, {slope:+.1f} MB a minute")

    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (1700, 1900, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG", compress_level=1)
    for data in (images[0], buffer.getvalue()):
        crowd = [Client(port) for _ in range(args.crowd)]
        found = at_once(crowd, lambda _, client, data=data: client.ask(data), server)
        one = Client(port)
        one.ask(images[0])
        print(f"{args.crowd} clients at once, {len(data) / 1e6:.3f} MB each: {found.statuses}, all within "
              f"{found.took:.1f} s, at most {max(found.memory, default=0):.0f} MB; one image right after: "
              f"{dict(one.statuses)}, {one.seconds[0]:.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
