"""Uploads: images out of a request's body into memory, within limits that hold before anything is decoded."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import HTTPException, Request
from PIL import Image, UnidentifiedImageError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from img2prompt.core.images import FORMATS, MAX_RATIO

MAX_BYTES = 10 * 2**20  # of a request's body
MAX_IMAGES = 16  # of a request
MAX_PIXELS = 40_000_000
MAX_SCANS = 64  # of a JPEG: one is a pass over all pixels and need not have more than 60 bytes
SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e]")  # the head of one, of 1 to 4 components
SECONDS = 30  # from a request's head to the end of its body
HELD = 128 * 2**20  # bytes of all uploads that are read, queued or worked on
NAME = 100  # characters of a file's name that are kept


class Full(Exception):
    """There is no room now for what was sent; there will be."""


@dataclass(frozen=True)
class Upload:
    """An image as it was sent: the name of its file, without folders, and its encoded bytes."""

    name: str
    data: bytes


class Memory:
    """Counts the bytes of uploads that are held at one time, at most `size`; of one event loop."""

    def __init__(self, size: int = HELD) -> None:
        self._left = size

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Yield what takes a number of bytes, or raises Full; they are given back when the block ends."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if count > self._left:
                raise Full("too many uploads at once")
            self._left -= count
            taken += count

        try:
            yield take
        finally:
            self._left += taken


async def read_uploads(request: Request, take: Callable[[int], None]) -> list[Upload]:
    """Read the images of a request: files of a multipart form, or one image as the body.

    take: is told of bytes before they are kept.

    Raises:
        HTTPException: there are none, or they are too large, too many, too slow, of another type or badly framed.
        ClientDisconnect: whoever sent it is gone.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind == b"multipart/form-data" and options.get(b"boundary"):
        body: _Form | _One = _Form(options[b"boundary"])
    elif kind.startswith(b"image/"):
        body = _One()
    else:
        raise HTTPException(415, "send files as multipart/form-data, or one image with its type, such as image/png")
    too_large = HTTPException(413, f"more than {MAX_BYTES >> 20} MB at once: send fewer or smaller images")
    if int(request.headers.get("content-length", 0)) > MAX_BYTES:
        raise too_large
    size = 0
    try:
        async with asyncio.timeout(SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > MAX_BYTES:
                    raise too_large
                take(len(chunk))
                body.write(chunk)
    except TimeoutError:
        raise HTTPException(408, f"not sent within {SECONDS} seconds", {"Connection": "close"}) from None
    return body.end()


def why_not(data: bytes) -> str:
    """Why an upload is no image to be decoded, by its header alone; empty where it is one."""
    if not data:
        return "it is empty"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except UnidentifiedImageError:
        return f"it is none of {', '.join(FORMATS)}"
    except Image.DecompressionBombError:
        return f"it has more than {MAX_PIXELS // 10**6} million pixels"
    except Exception as error:
        return f"it cannot be read: {type(error).__name__}"
    if width * height > MAX_PIXELS:
        return f"it has more than {MAX_PIXELS // 10**6} million pixels"
    if max(width, height) > MAX_RATIO * min(width, height):
        return f"it is more than {MAX_RATIO} times as long as it is wide"
    if len(SCAN.findall(data)) > MAX_SCANS:
        return f"it is drawn in more than {MAX_SCANS} passes"
    return ""


class _One:
    """One image as a request's body."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, chunk: bytes) -> None:
        self._data += chunk

    def end(self) -> list[Upload]:
        return [Upload("image", bytes(self._data))]


class _Form:
    """The files of a multipart form. Starlette's own reader writes larger ones to disk."""

    def __init__(self, boundary: bytes) -> None:
        self._uploads: list[Upload] = []
        self._headers: dict[bytes, bytes] = {}
        self._field, self._value, self._data = bytearray(), bytearray(), bytearray()
        self._name, self._ended = "", False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._header,
                    "on_headers_finished": self._head,
                    "on_part_data": lambda data, start, end: self._data.extend(data[start:end]),
                    "on_part_end": self._end,
                    "on_end": self._last,
                },
            )
        except FormParserError:
            raise HTTPException(400, "the form's boundary is too long") from None

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise HTTPException(400, "the body is no multipart form") from None

    def end(self) -> list[Upload]:
        if not self._ended:
            raise HTTPException(400, "the form ends too soon")
        if not self._uploads:
            raise HTTPException(400, "the form has no image")
        return self._uploads

    def _begin(self) -> None:
        if len(self._uploads) == MAX_IMAGES:
            raise HTTPException(413, f"more than {MAX_IMAGES} images at once: send fewer")
        self._headers = {}

    def _header(self) -> None:
        self._headers[bytes(self._field).lower()] = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _head(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        number = len(self._uploads) + 1
        if b"filename" not in options:
            raise HTTPException(400, f"part {number} of the form is no file")
        self._name = _cleaned(options[b"filename"].decode("utf-8", "replace"))
        kind, _ = parse_options_header(self._headers.get(b"content-type", b""))
        if kind not in (b"", b"application/octet-stream") and not kind.startswith(b"image/"):
            raise HTTPException(415, f"part {number} of the form is no image: send its type, such as image/png")

    def _end(self) -> None:
        self._uploads.append(Upload(self._name, bytes(self._data)))
        self._data.clear()

    def _last(self) -> None:
        self._ended = True


def _cleaned(name: str) -> str:
    """A file's name without folders and characters that cannot be seen."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(filter(str.isprintable, last)).strip()[:NAME] or "image"
