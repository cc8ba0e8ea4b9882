"""The page's server: its answers, its limits, hostile uploads, batching, a full queue, and its end."""

import gzip
import http.client
import io
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, WITHOUT, running
from PIL import Image
from pydantic import TypeAdapter

from img2prompt import Predictor
from img2prompt.app import server as serving
from img2prompt.app import uploads
from img2prompt.app.answers import FullAnswer, Gallery
from img2prompt.app.batching import Batcher
from img2prompt.app.server import HEADERS, about, listen
from img2prompt.app.uploads import MAX_BYTES, MAX_IMAGES, Full, Memory
from img2prompt.cli.main import main
from img2prompt.core.storage import write_json
from img2prompt.predict.bundle import MANIFEST

PNG, JPEG = "image/png", "image/jpeg"


def encoded(image=None, form="PNG", **options):
    file = io.BytesIO()
    (image or Image.new("RGB", (40, 30), (200, 30, 30))).save(file, form, **options)
    return file.getvalue()


GOOD = encoded()


class Echo:
    """Stands for `Answers`: says how many bytes there were, once `gate` is open; notes the names of each batch."""

    gallery, identity = Gallery([], lambda row: b""), "0" * 64

    def __init__(self):
        self.gate, self.batches = Event(), []
        self.gate.set()

    def __call__(self, given):
        self.batches.append([upload.name for upload in given])
        assert self.gate.wait(20)
        if "poison" in self.batches[-1]:
            raise RuntimeError("/secret/path")
        return [{"path": upload.name, "prompt": f"{len(upload.data)} bytes"} for upload in given]


@pytest.fixture
def echo():
    return Echo()


def form(*files, end=True, boundary="b"):
    """A multipart form of (name, type, data), or (name, data) for PNG."""
    parts = []
    for name, *kind, data in files:
        head = f'Content-Disposition: form-data; name="image"; filename="{name}"\r\nContent-Type: {(kind or [PNG])[0]}'
        parts.append(f"--{boundary}\r\n{head}\r\n\r\n".encode() + data + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode() * end


FORM = {"Content-Type": "multipart/form-data; boundary=b"}


def ask(port, method, path, body=None, headers=None):
    """Status, headers and JSON or bytes of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        text = response.read()
        is_json = response.headers["Content-Type"] == "application/json"
        return response.status, response.headers, json.loads(text) if is_json else text
    finally:
        connection.close()


def predict(port, *files, **headers):
    status, found, body = ask(port, "POST", "/predict", form(*files), FORM | headers)
    return status, found, body


def guarded(headers):
    return all(headers[name] == value for name, value in HEADERS.items())


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# What it says of images


@pytest.fixture
def port(answers, home):
    with running(answers) as (port, _):
        yield port


@pytest.fixture
def images(made):
    return sorted((made / "input/train/images").iterdir())


def near(found):
    """What is equal to it but for the last digits of numbers: an image's depend on what shares its batch."""
    if isinstance(found, float):
        return pytest.approx(found, abs=5e-3)
    if isinstance(found, dict):
        return {name: near(value) for name, value in found.items()}
    return [near(value) for value in found] if isinstance(found, list) else found


def test_it_says_what_predict_says(port, images, capsys):
    main(["predict", *map(str, images[:3]), "--format", "jsonl"])
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    files = [(image.name, image.read_bytes()) for image in images[:3]]
    status, _, found = predict(port, files[0], ("broken.jpg", JPG[: len(JPG) // 2]), *files[1:])
    assert status == 200
    broken = found["images"].pop(1)
    assert (set(broken), broken["path"]) == ({"path", "error"}, "broken.jpg")
    assert broken["error"].startswith("OSError: image file is truncated")
    for one, said, image in zip(found["images"], expected, images, strict=False):
        assert {name: one[name] for name in said} == near(said | {"path": image.name})
    for file, together in zip(files, found["images"], strict=True):
        status, _, alone = predict(port, file)
        assert (status, alone["images"]) == (200, [near(together)])
    status, _, raw = ask(port, "POST", "/predict", files[0][1], {"Content-Type": PNG})
    assert (status, raw["images"]) == (200, [near(found["images"][0] | {"path": "image"})])


def test_it_shows_the_models_side_by_side(port, images, answers, made):
    _, _, found = predict(port, ("a.png", images[7].read_bytes()))
    (one,) = found["images"]
    predictor = Predictor.load(made / "outputs", "cpu")
    known = predictor.predict([images[7]])
    vectors = {"ensemble": known.embeddings[0]} | {name: rows[0] for name, rows in known.members.items()}
    assert {model["model"] for model in one["models"]} == set(vectors)
    for model in one["models"]:
        name, vector = model["model"], vectors[model["model"]] / np.linalg.norm(vectors[model["model"]])
        assert model["weight"] == (1 if name == "ensemble" else predictor.weights[name])
        for other, cosine in model["cosines"].items():
            assert cosine == pytest.approx(vector @ vectors[other] / np.linalg.norm(vectors[other]), abs=1e-4)
        ((prompt, cosine),) = predictor.words.nearest(vector[None], 1)[0]
        assert (model["prompt"], model["cosine"]) == (prompt, pytest.approx(cosine, abs=1e-4))
    assert one["models"][0]["prompt"] == one["nearest"][0]["prompt"]
    texts = pq.read_table(made / "outputs/prepare/train.parquet")["prompt"].to_pylist()
    shown = {entry["prompt"] for entry in (*one["nearest"], *one["models"])}
    assert set(one["thumbnails"]) == shown
    for text, address in one["thumbnails"].items():
        status, headers, data = ask(port, "GET", f"/{address}")
        assert (status, headers["Content-Type"]) == (200, JPEG)
        row = int(re.match(r"thumbnails/(\d+)\?", address)[1])
        assert texts[row] == text
        assert Image.open(io.BytesIO(data)).size == Image.open(images[row]).size  # smaller than a thumbnail already


def test_its_answers_are_as_openapi_json_has_them(port, images):
    _, _, api = ask(port, "GET", "/openapi.json")
    assert set(api["paths"]) == {"/predict", "/health", "/samples", "/thumbnails/{row}"}
    assert set(api["paths"]["/predict"]["post"]["requestBody"]["content"]) == {"multipart/form-data", "image/*"}
    _, _, found = predict(port, ("a.png", images[0].read_bytes()), ("b.png", b""))
    schema = TypeAdapter(list[FullAnswer])
    assert schema.validate_python(found["images"], strict=True) == found["images"]  # which drops what is unknown
    named = api["components"]["schemas"]["FullAnswer"]
    assert set(found["images"][0]) | {"error"} == set(named["properties"])
    status, _, health = ask(port, "GET", "/health")
    assert status == 200
    assert health["queue"] == {"waiting": 0, "limit": 128}
    assert (health["bundle"], health["version"]) == ("tiny", api["info"]["version"])
    for path in ("/docs", "/redoc", "/nothing", "/thumbnails/60"):
        assert ask(port, "GET", path)[::2] == (
            404,
            {"error": "there is no such image" if "/60" in path else "Not Found"},
        )
    for path in ("/thumbnails/x", "/thumbnails/-1", f"/thumbnails/{'9' * 5000}"):
        assert ask(port, "GET", path)[::2] == (422, {"error": "not as openapi.json has it"})


def test_samples_are_spread_over_the_training_images(port, made):
    _, _, samples = ask(port, "GET", "/samples")
    texts = pq.read_table(made / "outputs/prepare/train.parquet")["prompt"].to_pylist()
    assert [sample["prompt"] for sample in samples] == texts[::5]
    for sample in samples[:1]:
        status, _, data = ask(port, "GET", f"/{sample['image']}")
        assert status == 200
        assert predict(port, ("sample.jpg", JPEG, data))[0] == 200


def test_a_bundle_s_gallery_and_what_stands_in_for_none(tmp_path):
    write_json(tmp_path / MANIFEST, {"files": {}, "canaries": {"images": ["canaries/0.png", "canaries/1.png"]}})
    files = {f"canaries/{number}.png": {"file": f"c{number}.png"} for number in range(2)}
    for number, entry in enumerate(files.values()):
        Image.new("RGB", (300, 200), (number, 0, 0)).save(tmp_path / entry["file"])
    manifest = {"canaries": {"images": list(files)}}
    write_json(tmp_path / MANIFEST, manifest | {"files": files})
    gallery = Gallery.load(tmp_path)
    assert len(gallery.texts) == 2
    assert Image.open(io.BytesIO(gallery.read(1))).size == (128, 85)

    prompts = ["a", "b", "a", "c", "d", "e", "no image"]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "p")
    with pq.ParquetWriter(tmp_path / "t", pa.schema({"image": pa.binary()})) as writer:
        for part in ([b"0", b"1", b"2"], [b"3"], [b"4", b"5"]):
            writer.write_table(pa.table({"image": part}))
    files |= {"prompts.parquet": {"file": "p"}, "thumbnails.parquet": {"file": "t"}}
    write_json(tmp_path / MANIFEST, manifest | {"files": files})
    gallery = Gallery.load(tmp_path)
    assert [gallery.read(row) for row in range(6)] == [b"0", b"1", b"2", b"3", b"4", b"5"]
    assert gallery.rows == {"a": 0, "b": 1, "c": 3, "d": 4, "e": 5}
    assert gallery.samples() == [0, 1, 2, 3, 4, 5]


# What it refuses


def chunk(kind, body):
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def png(width, height, *chunks):
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


ZEROS = chunk(b"IDAT", zlib.compress(bytes(2**22)))
JPG = encoded(Image.effect_noise((200, 200), 90), "JPEG")
HUGE = JPG[: JPG.index(b"\xff\xc0") + 5] + b"\xff\xff\xff\xff" + JPG[JPG.index(b"\xff\xc0") + 9 :]
PASSES = encoded(form="JPEG", progressive=True)
NO_IMAGES = {
    "empty": b"",
    "text": b"no image",
    "html": b"<html><script>alert(1)</script></html>",
    "svg that refers to a file": b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) run\n%%EOF\n",
    "pdf": b"%PDF-1.7\n1 0 obj<</OpenAction<</S/JavaScript/JS(app.alert(1))>>>>endobj",
    "zip": b"PK\x03\x04" + bytes(200),
    "program": b"\x7fELF\x02\x01\x01" + bytes(200),
    "shell script": b"#!/bin/sh\ntouch /tmp/owned\n",
    "pickle": b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.",
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "video": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(100),
    "zipped png": gzip.compress(GOOD),
    "png signature alone": GOOD[:8],
    "png cut in its head": GOOD[:20],
    "png cut in its pixels": GOOD[:50],
    "png with another checksum": GOOD[:30] + bytes([GOOD[30] ^ 1]) + GOOD[31:],
    "png without pixels": png(40, 30),
    "png with broken pixels": png(40, 30, chunk(b"IDAT", b"no zlib")),
    "jpeg cut in its pixels": JPG[: len(JPG) // 2],
    "jpeg cut in its head": JPG[:100],
    "gif that is a script": b"GIF89a/*" + bytes(8) + b"*/=1;alert(1)//",
    "png that is a page": b"\x89PNG\r\n\x1a\n<html><script>alert(1)</script>",
    "png, then php": GOOD[:40] + b"<?php system($_GET['c']); ?>",
    "bmp of negative size": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -9, -9, 1, 24, 0, 0, 0, 0, 0, 0),
    "tiff that goes in circles": b"II*\0\x08\0\0\0" + b"\0\0" + b"\x08\0\0\0",
    "webp of another length": b"RIFF\xff\xff\xff\x7fWEBPVP8 " + bytes(30),
    "avif in name": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(60),
    "ppm of no size": b"P6\n0 0\n255\n",
    "bomb: png, 200 million pixels": encoded(Image.new("1", (20000, 10000))),
    "bomb: png, 49 million pixels": encoded(Image.new("1", (7000, 7000))),
    "bomb: png, 2**62 pixels": png(2**31 - 1, 2**31 - 1, ZEROS),
    "bomb: gif": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(20),
    "bomb: jpeg": HUGE,
    "bomb: ppm": b"P6\n60000 60000\n255\n",
    "bomb: jpeg, 1,000 passes": PASSES[:-2] + PASSES[PASSES.rindex(b"\xff\xda") : -2] * 1000 + PASSES[-2:],
    "bomb: text of a png": png(1, 1, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27)))),
    "a line that would be scaled up": encoded(Image.new("L", (30000, 2))),
}


@pytest.fixture(scope="module")
def shared(answers, made):
    """A port for requests that must all be refused; after each the page is there, and at the end it answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        with running(answers) as (port, _):
            yield port
            assert predict(port, ("a.png", GOOD))[0] == 200


def writes(flags):
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


watching = []  # lists of what Python code opened for writing, or made, moved or removed


def _hook(event, details):
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate")
    if watching and (changes or event.startswith(("tempfile.", "shutil.")) or (event == "open" and writes(details[2]))):
        for seen in watching:
            seen.append((event, *map(str, details)))


sys.addaudithook(_hook)


@pytest.fixture(autouse=True)
def nothing_is_written(request):
    """But for tests of this module that write themselves."""
    if not {"shared", "port"} & set(request.fixturenames):
        yield
        return
    seen = []
    watching.append(seen)
    yield
    watching.remove(seen)
    assert seen == []


def test_the_watch_on_the_disk_sees_what_is_written(tmp_path):
    seen = []
    watching.append(seen)
    with tempfile.SpooledTemporaryFile(max_size=10) as file:
        file.write(b"a")
        assert seen == []
        file.write(bytes(20))
    watching.remove(seen)
    assert seen


def is_clean(body):
    """No path, no trace, no version in an error."""
    assert not re.search(
        r"/\w+/|Traceback|\.py\b|line \d|0x[0-9a-f]{4}|\d\.\d|PIL|python", json.dumps(body), re.IGNORECASE
    )


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_refused(shared, name):
    data = NO_IMAGES[name]
    status, headers, body = predict(shared, (f"{name}.png", data))
    assert status == 422, body
    assert [set(one) for one in body["images"]] == [{"path", "error"}]
    is_clean(body["images"][0]["error"])
    assert guarded(headers)
    assert ask(shared, "POST", "/predict", data, {"Content-Type": JPEG})[0] == 422
    assert ask(shared, "GET", "/")[0] == 200


PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
REFUSED = {
    "no type": (415, GOOD, {}),
    "json": (415, b'{"image": "file:///etc/passwd"}', {"Content-Type": "application/json"}),
    "fields": (415, b"image=http://169.254.169.254/", {"Content-Type": "application/x-www-form-urlencoded"}),
    "form without a boundary": (415, form(("a", GOOD)), {"Content-Type": "multipart/form-data"}),
    "form of html": (415, form(("a.png", "text/html", GOOD)), FORM),
    "form with another boundary": (400, form(("a", GOOD), boundary="c"), FORM),
    "form with too long a boundary": (400, GOOD, {"Content-Type": f"multipart/form-data; boundary={'b' * 3000}"}),
    "form that ends too soon": (400, form(("a", GOOD), end=False), FORM),
    "form without parts": (400, b"--b--\r\n", FORM),
    "form of a text": (400, b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n/etc\r\n--b--\r\n', FORM),
    "form with too many heads": (400, PART + b"X: y\r\n" * 50 + b"\r\n\r\n--b--\r\n", FORM),
    "form with too long a head": (400, PART + b"X: " + b"y" * 9000 + b"\r\n\r\n\r\n--b--\r\n", FORM),
    "nothing": (400, b"", FORM),
    "too many images": (413, form(*[("a", GOOD)] * (MAX_IMAGES + 1)), FORM),
    "a hundred thousand empty parts": (413, (PART + b"\r\n\r\n") * 100_000, FORM),
    "11 MB": (413, form(("a", bytes(11 * 2**20))), FORM),
    "11 MB as the body": (413, bytes(11 * 2**20), {"Content-Type": PNG}),
    "another host": (421, form(("a", GOOD)), FORM | {"Host": "evil.example"}),
    "a host that is none": (421, form(("a", GOOD)), FORM | {"Host": "[::"}),
    "another site's page": (403, form(("a", GOOD)), FORM | {"Sec-Fetch-Site": "cross-site"}),
    "another method": (405, GOOD, {"Content-Type": PNG}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_is_not_as_it_should_be_is_refused(shared, name):
    expected, body, headers = REFUSED[name]
    status, found, body = ask(shared, "PUT" if expected == 405 else "POST", "/predict", body, headers)
    assert (status, set(body)) == (expected, {"error"})
    is_clean(body)
    assert guarded(found)
    assert "server" not in found
    assert ask(shared, "GET", "/")[0] == 200


def raw(port, *parts, pause=0.0):
    """What comes back on parts of a request that are sent as they are, until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
        for part in parts:
            try:
                link.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(pause)
        found = b""
        try:
            while b"\r\n\r\n" not in found and (more := link.recv(65536)):
                found += more
        except ConnectionResetError:
            pass
        return found


def head(*lines, host="127.0.0.1"):
    return "\r\n".join(["POST /predict HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


CHUNKED = head("Content-Type: image/png", "Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    ("status", "parts"),
    [
        (413, [head("Content-Type: image/png", "Content-Length: 200000000")]),
        (413, [CHUNKED, *[b"100000\r\n" + bytes(2**20) + b"\r\n"] * 200, b"0\r\n\r\n"]),
        (400, [CHUNKED, b"-5\r\nhello\r\n"]),
        (400, [head("Content-Type: image/png", "Content-Length: -1")]),
        (400, [head("Content-Type: image/png", "Content-Length: 5", "Content-Length: 6"), b"hello!"]),
        (400, [b"POST /predict HTTP/1.1\r\nContent-Length: 0\r\n\r\n"]),
        (400, [b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(200)]),
        (400, [b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * 100_000]),
    ],
    ids=["200 MB", "200 MB in chunks", "bad chunk", "less than nothing", "two lengths", "no host", "TLS", "long head"],
)
def test_a_request_that_is_none_is_refused(shared, status, parts):
    assert raw(shared, *parts).startswith(b"HTTP/1.1 %d " % status)
    assert ask(shared, "GET", "/")[0] == 200


def test_a_slow_body_is_not_waited_for(shared, monkeypatch):
    monkeypatch.setattr(uploads, "SECONDS", 0.2)
    parts = [head("Content-Type: image/png", "Content-Length: 1000"), *[b"a"] * 8]
    assert raw(shared, *parts, pause=0.05).startswith(b"HTTP/1.1 408 ")


def test_a_slow_head_is_not_waited_for(echo, monkeypatch):
    """Neither the first of a connection nor one after an answer."""
    monkeypatch.setattr(serving, "SECONDS", 0.2)
    with running(echo) as (port, _):
        slow = [b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * 20]
        assert raw(port, *slow, pause=0.05) == b""
        with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
            link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert link.recv(65536)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                for _ in range(100):
                    link.sendall(b"X: y\r\n")
                    time.sleep(0.02)


def test_connections_are_so_many_and_no_more(echo, monkeypatch):
    monkeypatch.setattr(serving, "CONNECTIONS", 3)
    with running(echo) as (port, _):
        links = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(4)]
        assert links[3].recv(1) == b""
        for link in links:
            link.close()
        until(lambda: alive(port))


def alive(port):
    try:
        return ask(port, "GET", "/")[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../etc/passwd", "passwd"), ("C:\\Users\\me\\a.png", "a.png"), ("/", "image"), ("", "image"),
        ("a\u202egnp.exe", "agnp.exe"), ("naïve 猫.png", "naïve 猫.png"), ("x" * 3000, "x" * 100), ("a\tb", "ab"),
    ],
)  # fmt: skip
def test_names_lose_folders_and_what_cannot_be_seen(shared, name, kept):
    status, _, found = predict(shared, (name, b"no image"))
    assert (status, found["images"][0]["path"]) == (422, kept)


def test_a_picture_with_something_behind_it_is_that_picture(shared):
    status, _, found = predict(shared, ("a.png", GOOD + b"PK\x03\x04<script>"), ("b.png", GOOD))
    one, other = found["images"]
    assert (status, one) == (200, near(other | {"path": "a.png"}))


def test_names_that_it_goes_by(echo):
    with running(echo, ["Prompts.Example"]) as (port, _):
        for host in ("localhost", "127.0.0.1:8000", "prompts.example", "PROMPTS.example:443"):
            assert ask(port, "GET", "/health", headers={"Host": host})[0] == 200
        for host in ("prompts.example.evil", "10.0.0.1", "", "a@localhost.evil"):
            assert ask(port, "GET", "/health", headers={"Host": host})[0] == 421


# Many at once


def test_requests_are_answered_together(echo):
    with running(echo) as (port, _), ThreadPoolExecutor(50) as pool:
        echo.gate.clear()
        first = pool.submit(predict, port, ("first", GOOD))
        until(lambda: echo.batches)
        asked = [pool.submit(predict, port, (f"{n}", GOOD + bytes(n)), (f"{n}b", GOOD)) for n in range(25)]
        until(lambda: ask(port, "GET", "/health")[2]["queue"]["waiting"] == 50)
        echo.gate.set()
        assert first.result()[0] == 200
        for number, answer in enumerate(asked):
            status, _, found = answer.result()
            assert status == 200
            said = [(one["path"], one["prompt"]) for one in found["images"]]
            assert said == [(f"{number}", f"{len(GOOD) + number} bytes"), (f"{number}b", f"{len(GOOD)} bytes")]
        assert [len(batch) for batch in echo.batches] == [1, 32, 18]


def test_a_full_queue_says_when_to_come_again(echo):
    with running(echo, batch=2, limit=4) as (port, _), ThreadPoolExecutor(8) as pool:
        echo.gate.clear()
        taken = [pool.submit(predict, port, ("a", GOOD))]
        until(lambda: echo.batches)
        taken += [pool.submit(predict, port, ("b", GOOD), ("c", GOOD)) for _ in range(2)]
        until(lambda: ask(port, "GET", "/health")[2]["queue"]["waiting"] == 4)
        status, headers, body = predict(port, ("late", GOOD))
        assert (status, int(headers["Retry-After"])) == (503, 1)
        assert body == {"error": "too many images are waiting: try again in 1 s"}
        assert ask(port, "GET", "/")[0] == 200
        echo.gate.set()
        assert [answer.result()[0] for answer in taken] == [200] * 3
        assert predict(port, ("late", GOOD))[0] == 200


def test_uploads_take_so_much_memory_and_no_more(echo):
    with running(echo, memory=Memory(3 * len(GOOD))) as (port, _), ThreadPoolExecutor(3) as pool:
        echo.gate.clear()
        taken = [pool.submit(ask, port, "POST", "/predict", GOOD, {"Content-Type": PNG}) for _ in range(3)]
        until(lambda: ask(port, "GET", "/health")[2]["queue"]["waiting"] + sum(map(len, echo.batches)) == 3)
        status, headers, body = ask(port, "POST", "/predict", GOOD, {"Content-Type": PNG})
        assert (status, headers["Retry-After"]) == (503, "1")
        assert body["error"].startswith("too many uploads at once")
        echo.gate.set()
        assert [answer.result()[0] for answer in taken] == [200] * 3
        for _ in range(5):
            assert ask(port, "POST", "/predict", GOOD, {"Content-Type": PNG})[0] == 200
            assert ask(port, "POST", "/predict", b"a" * len(GOOD), {"Content-Type": PNG})[0] == 422


def test_memory_is_given_back_whatever_happens():
    memory = Memory(10)
    with pytest.raises(Full), memory.share() as take:
        take(6)
        with memory.share() as other:
            other(4)
            other(1)
    with memory.share() as take:
        take(10)


def test_who_goes_away_is_not_worked_for(echo):
    with running(echo) as (port, _), ThreadPoolExecutor(2) as pool:
        echo.gate.clear()
        first = pool.submit(predict, port, ("first", GOOD))
        until(lambda: echo.batches)
        with socket.create_connection(("127.0.0.1", port)) as link:
            body = form(("gone", GOOD))
            link.sendall(head("Content-Type: multipart/form-data; boundary=b", f"Content-Length: {len(body)}") + body)
            until(lambda: ask(port, "GET", "/health")[2]["queue"]["waiting"] == 1)
        with socket.create_connection(("127.0.0.1", port)) as link:  # this one in the middle of its body
            link.sendall(head("Content-Type: image/png", "Content-Length: 1000") + b"a")
        time.sleep(0.2)
        second = pool.submit(predict, port, ("second", GOOD))
        until(lambda: ask(port, "GET", "/health")[2]["queue"]["waiting"] == 2)
        echo.gate.set()
        assert (first.result()[0], second.result()[0]) == (200, 200)
        assert echo.batches == [["first"], ["second"]]


def test_what_fails_in_a_batch_fails_alone(echo, capfd):
    with running(echo) as (port, _), ThreadPoolExecutor(3) as pool:
        echo.gate.clear()
        first = pool.submit(predict, port, ("first", GOOD))
        until(lambda: echo.batches)
        asked = [pool.submit(predict, port, (name, GOOD)) for name in ("fine", "poison")]
        until(lambda: ask(port, "GET", "/health")[2]["queue"]["waiting"] == 2)
        echo.gate.set()
        assert (first.result()[0], asked[0].result()[0]) == (200, 200)
        status, headers, body = asked[1].result()
        assert (status, body) == (500, {"error": "something went wrong here"})
        assert guarded(headers)
        assert predict(port, ("more", GOOD))[0] == 200
    assert "/secret/path" in capfd.readouterr().err  # whoever runs it learns why


def test_it_ends_when_it_has_answered(echo):
    with ThreadPoolExecutor(5) as pool:
        with running(echo) as (port, started):
            echo.gate.clear()
            taken = [pool.submit(predict, port, (f"{number}", GOOD)) for number in range(4)]
            until(lambda: ask(port, "GET", "/health")[2]["queue"]["waiting"] + sum(map(len, echo.batches)) == 4)
            started.should_exit = True
            until(lambda: not alive(port))  # nobody else is let in
            echo.gate.set()
        assert [answer.result()[0] for answer in taken] == [200] * 4


def test_a_closed_batcher_takes_nothing_more():
    batches = Batcher(lambda items: [item + 1 for item in items])
    futures = batches.put([1, 2])
    batches.close()
    assert [future.result() for future in futures] == [2, 3]
    with pytest.raises(Full):
        batches.put([3])


# The command


def test_the_command_serves_writes_nothing_and_ends(made, tmp_path):
    """By no more than its dependencies. The kernel refuses its writes once it runs; what it has taken it answers."""
    command = [sys.executable, "-c", f"{WITHOUT}\nfrom img2prompt.cli.main import main\nmain()", "serve", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "TMPDIR": str(tmp_path)}
    done = subprocess.Popen(
        command, cwd=made, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\n", done.stdout.readline())[1])
        resource.prlimit(done.pid, resource.RLIMIT_FSIZE, (0, 0))
        before = set(tmp_path.rglob("*"))
        noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (1700, 1900, 3), np.uint8)))
        assert 9 * 2**20 < len(noise) < MAX_BYTES
        assert predict(port, ("noise.png", noise))[0] == 200
        assert predict(port, ("bomb.png", NO_IMAGES["bomb: text of a png"]))[0] == 422
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(predict, port, ("noise.png", noise))
            until(lambda: ask(port, "GET", "/health")[2]["queue"]["waiting"] or last.done() or time.sleep(0.05))
            done.send_signal(signal.SIGTERM)
            assert last.result()[0] == 200
        assert set(tmp_path.rglob("*")) == before
        assert done.wait(20) == 0
        assert "Traceback" not in done.stderr.read()
    finally:
        done.kill()
        done.communicate()


def test_it_does_not_start_without_a_model_or_an_address(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"bundle: the model cannot be loaded"):
        main(["serve", "--port", "0", "--bundle", "bundle"])
    with listen("127.0.0.1", 0) as bound, pytest.raises(SystemExit, match="name others with --host and --port"):
        bound.listen()
        main(["serve", "--port", str(bound.getsockname()[1])])
    with pytest.raises(SystemExit, match="name others with --host and --port"):
        main(["serve", "--host", "256.0.0.1"])


def test_it_says_what_it_means_to_be_reached_from_elsewhere():
    with listen("127.0.0.1", 0) as bound:
        assert about(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}/"
    with listen("0.0.0.0", 0) as bound:
        assert "Everyone who can reach this address" in about(bound)
        assert "no password and no encryption" in about(bound)
