"""Image files: reading their encoded bytes, decoding them to RGB, and packing them into a tar."""

from __future__ import annotations

import contextlib
import io
import re
import stat
import tarfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# A reference is a file's path, or `file#offset+size`: bytes inside a larger file, such as a tar's member.
SPAN = re.compile(r"\d+\+\d+")
MAX_BYTES = 2**28  # a larger file is no image, whatever its name says
MAX_RATIO = 40  # of the sides: the shorter one is scaled to a tower's size, so a mere line would grow to gigabytes
# Not every format that Pillow knows: some run other programs or fetch files that they refer to.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def read_image(reference: str) -> bytes:
    """Read an image's encoded bytes.

    Raises:
        OSError: the file is missing, not a regular file, larger than MAX_BYTES, or shorter than the reference says.
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
    if not stat.S_ISREG(about.st_mode):  # reading a pipe would block
        raise OSError(f"{path}: not a regular file")
    if about.st_size > MAX_BYTES:
        raise OSError(f"{path}: larger than {MAX_BYTES >> 20} MB")
    return path.read_bytes()


def decode(data: bytes) -> Image.Image:
    """Decode to 8-bit RGB: the first frame, upright by EXIF, transparency over white, 16-bit grey scaled to 8 bits.

    Raises:
        ValueError: the bytes are no image, are cut short, decode to more than 89 million pixels, or see `to_rgb`.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns above 89 million pixels and refuses above twice that; here the warning is an error.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # about odd metadata
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
    except UnidentifiedImageError:
        raise ValueError(f"UnidentifiedImageError: none of {', '.join(FORMATS)}") from None
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as 8-bit RGB, as `decode` has it.

    Raises:
        ValueError: one side is more than MAX_RATIO times the other.
    """
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: more than {MAX_RATIO} times as long as it is wide")
    with contextlib.suppress(Exception):  # broken EXIF is no reason to lose an image
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # what is upright would be copied
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(reference: str) -> Image.Image:
    """Read and decode an image as RGB.

    Raises:
        OSError: as `read_image`.
        ValueError: as `decode`; the message begins with the reference.
    """
    try:
        return decode(read_image(reference))
    except ValueError as error:
        raise ValueError(f"{reference}: {error}") from None


def pack(path: Path, names: Sequence[str], images: Iterable[bytes]) -> list[str]:
    """Write encoded images into one tar; return `#offset+size` of each in order, to be put after the tar's path.

    The tar carries no times or owners, so that equal images give an equal tar.

    Raises:
        ValueError: the numbers of names and images differ.
    """
    references = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in zip(names, images, strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            # The data follow the member's header and are padded to whole blocks.
            blocks = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            references.append(f"#{tar.offset - blocks}+{len(data)}")
    return references
