"""Pictures: where their bytes are, and how they become RGB."""

from __future__ import annotations

import contextlib
import io
import re
import stat
import tarfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

# A reference is a file's path, or `file#offset+size`: bytes inside a larger file, such as a tar's member.
SPAN = re.compile(r"\d+\+\d+")
MAX_BYTES = 2**28  # no picture, whatever its name says
# Not all that Pillow knows: some formats run other programs or fetch what they refer to.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def read_picture(reference: str) -> bytes:
    """Read a picture's encoded bytes.

    Raises:
        OSError: the file is missing or shorter than the reference says.
    """
    path, mark, span = reference.rpartition("#")
    if not mark or not SPAN.fullmatch(span) or Path(reference).is_file():
        return _read_file(Path(reference))
    offset, size = map(int, span.split("+"))
    if size > MAX_BYTES:
        raise OSError(f"{reference}: larger than {MAX_BYTES >> 20} MB")
    with Path(path).open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"{reference}: the file ends after {len(data)} of {size} bytes")
    return data


def _read_file(path: Path) -> bytes:
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for
        raise OSError(f"{path}: no regular file")
    if about.st_size > MAX_BYTES:
        raise OSError(f"{path}: larger than {MAX_BYTES >> 20} MB")
    return path.read_bytes()


def decode(data: bytes) -> Image.Image:
    """Decode to RGB: first frame, upright by EXIF, transparency over white, 16-bit grey scaled to 8.

    Raises:
        ValueError: the bytes are no picture, are cut short, or unpack to an absurd size.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns at 89 million pixels and refuses at twice that; a bomb is a bomb.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # oddities of metadata
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            picture.load()
            with contextlib.suppress(Exception):  # broken EXIF is no reason to lose a picture
                picture = ImageOps.exif_transpose(picture)
    except UnidentifiedImageError:
        raise ValueError(f"UnidentifiedImageError: none of {', '.join(FORMATS)}") from None
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if picture.mode.startswith(("I", "F")):
        return picture.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def open_picture(reference: str) -> Image.Image:
    """Read and decode a picture as RGB.

    Raises:
        ValueError, OSError: naming the reference.
    """
    try:
        return decode(read_picture(reference))
    except ValueError as error:
        raise ValueError(f"{reference}: {error}") from None


def pack(path: Path, names: Sequence[str], pictures: Iterable[bytes]) -> list[str]:
    """Write encoded pictures into one tar and return the references to them, in order.

    The tar carries no times or owners: equal pictures are equal bytes.
    """
    references = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in zip(names, pictures, strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            # The data follow the member's header and are padded to whole blocks.
            blocks = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            references.append(f"#{tar.offset - blocks}+{len(data)}")
    return references
