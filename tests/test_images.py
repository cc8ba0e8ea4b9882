import io
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from img2prompt.core.images import decode, open_image, pack, read_image


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def corner(data):
    return np.asarray(decode(data))[0, 0].tolist()


RED = Image.new("RGB", (8, 6), (255, 0, 0))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_formats(form):
    image = decode(encoded(RED, form))
    assert image.mode == "RGB"
    assert image.size == (8, 6)
    assert np.allclose(np.asarray(image)[3, 3], [255, 0, 0], atol=8)


def test_transparency_shows_white():
    assert corner(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == [255, 255, 255]
    assert corner(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))) == [255, 0, 0]
    palette = RED.convert("P")
    assert corner(encoded(palette, transparency=palette.getpixel((0, 0)))) == [255, 255, 255]


def test_sixteen_bit_grey_is_scaled_not_cut():
    image = Image.fromarray(np.full((4, 4), 32896, np.uint16))
    assert corner(encoded(image)) == [128, 128, 128]


def test_grey_and_cmyk():
    assert corner(encoded(Image.new("L", (4, 4), 7))) == [7, 7, 7]
    assert np.allclose(corner(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")), [255, 0, 0], atol=8)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    assert decode(encoded(RED, "JPEG", exif=exif)).size == (6, 8)


def test_broken_exif_is_no_reason_to_lose_a_image():
    data = encoded(RED, "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    assert decode(data).size == (8, 6)


def test_palette_and_sixteen_bit_colour():
    assert np.allclose(corner(encoded(RED.convert("P"))), [255, 0, 0])
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")  # noqa: E731
    header = (1).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    pixel = zlib.compress(b"\0\xff\xff\x80\x00\x00\x00")
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")
    assert corner(data) == [255, 128, 0]


def test_formats_that_run_other_programs_are_refused():
    with pytest.raises(ValueError, match="none of PNG"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")


def test_an_animated_webp_too():
    blue = Image.new("RGB", (8, 6), (0, 0, 255))
    assert np.allclose(corner(encoded(RED, "WEBP", save_all=True, append_images=[blue])), [255, 0, 0], atol=8)


def test_no_file_is_too_large_to_be_refused(tmp_path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(2**40)
    for reference in (str(path), f"{path}#0+{2**39}"):
        with pytest.raises(OSError, match="larger than 256 MB"):
            read_image(reference)


def test_first_frame_of_an_animation():
    blue = Image.new("RGB", (8, 6), (0, 0, 255))
    assert np.allclose(corner(encoded(RED, "GIF", save_all=True, append_images=[blue])), [255, 0, 0], atol=8)


@pytest.mark.parametrize("data", [b"", b"no image", encoded(RED)[:40], encoded(RED, "JPEG")[:300]])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ValueError, match=r"Error|error"):
        decode(data)


def test_a_bomb_is_refused():
    with pytest.raises(ValueError, match="DecompressionBomb"):
        decode(encoded(Image.new("1", (20000, 10000))))


def test_a_line_is_refused():
    """With 224 pixels for its shorter side it would take 2 GB."""
    for size in ((30000, 2), (2, 30000)):
        with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels: more than 40 times"):
            decode(encoded(Image.new("RGB", size)))
    assert decode(encoded(Image.new("RGB", (400, 10)))).size == (400, 10)


def test_images_in_one_tar(tmp_path):
    images = [encoded(Image.new("RGB", (4, 4), (shade, 0, 0))) for shade in range(5)]
    tar = tmp_path / "images.tar"
    spans = pack(tar, [f"{number}.png" for number in range(5)], images)
    assert [read_image(f"{tar}{span}") for span in spans] == images
    assert np.asarray(open_image(f"{tar}{spans[3]}"))[0, 0, 0] == 3
    with tarfile.open(tar) as archive:
        assert archive.getnames() == [f"{number}.png" for number in range(5)]
        assert archive.extractfile("2.png").read() == images[2]
    before = tar.read_bytes()
    pack(tar, [f"{number}.png" for number in range(5)], images)
    assert tar.read_bytes() == before


def test_a_short_tar_is_reported(tmp_path):
    tar = tmp_path / "images.tar"
    (span,) = pack(tar, ["a"], [encoded(RED)])
    tar.write_bytes(tar.read_bytes()[:520])
    with pytest.raises(OSError, match="ends after 8 of"):
        read_image(f"{tar}{span}")


def test_a_name_with_a_hash_is_a_name(tmp_path):
    path = tmp_path / "a#1+2.png"
    path.write_bytes(encoded(RED))
    assert read_image(str(path)) == encoded(RED)
