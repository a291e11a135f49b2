"""One image file: which conversions are made, and that what is no image is one line."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from suite.errors import shown
from tasks.vision.decode import DecodeError, open_image
from tasks.vision.fashion_mnist import MINI_FILE, read_mini

pytestmark = pytest.mark.vision


@pytest.fixture(scope="module")
def grey():
    """A real photograph, [28, 28] uint8."""
    return read_mini(MINI_FILE)["train_images"][3]


@pytest.fixture(scope="module")
def colour():
    """Three real photographs as the channels of one, [28, 28, 3] uint8."""
    return np.stack(list(read_mini(MINI_FILE)["train_images"][3:6]), -1)


def pixels(path) -> np.ndarray:
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.txt"])
def test_a_colour_image_is_read_by_its_content_whatever_its_name(tmp_path, colour, name):
    formats = {"a.txt": "PNG", "a.tif": "TIFF"}
    Image.fromarray(colour).save(tmp_path / name, format=formats.get(name))
    assert np.array_equal(pixels(tmp_path / name), colour)


def test_a_jpeg_has_the_pixels_that_torchvision_and_timm_see(tmp_path, colour):
    Image.fromarray(colour).save(tmp_path / "a.jpg", quality=90)
    with Image.open(tmp_path / "a.jpg") as plain:
        assert np.array_equal(pixels(tmp_path / "a.jpg"), np.asarray(plain.convert("RGB")))


def test_grey_becomes_three_equal_channels(tmp_path, grey):
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.stack([grey] * 3, -1))
    Image.fromarray(grey > 127).save(tmp_path / "b.png")  # one bit a pixel
    assert np.array_equal(pixels(tmp_path / "b.png")[..., 0], np.where(grey > 127, 255, 0))


@pytest.mark.filterwarnings("error")
def test_a_palette_gives_its_colours_also_where_one_is_transparent(tmp_path, colour):
    image = Image.fromarray(colour).quantize(16)
    for name, extra in (("a.png", {}), ("b.png", {"transparency": bytes([0, 128, 255])})):
        image.save(tmp_path / name, **extra)
        assert np.array_equal(pixels(tmp_path / name), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_and_not_blended(tmp_path, colour, grey):
    rgba = np.concatenate([colour, grey[..., None]], -1)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), colour)
    Image.fromarray(np.stack([grey, 255 - grey], -1)).save(tmp_path / "b.png")
    assert np.array_equal(pixels(tmp_path / "b.png")[..., 1], grey)


def test_a_cmyk_jpeg_becomes_rgb(tmp_path, colour):
    inks = Image.fromarray(colour).convert("CMYK")
    inks.save(tmp_path / "a.jpg", quality=100, subsampling=0)
    found = pixels(tmp_path / "a.jpg").astype(int)
    assert np.abs(found - colour.astype(int)).mean() < 4  # JPEG's own loss; inverted: over 100
    with Image.open(tmp_path / "a.jpg") as plain:
        assert plain.mode == "CMYK"
        assert np.array_equal(found, np.asarray(plain.convert("RGB")))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_of_grey_keep_their_high_byte_and_do_not_clip_to_white(tmp_path, grey, name):
    deep = grey.astype(np.uint16) * 257
    if name == "a.pgm":  # Pillow 10 writes no such file
        (tmp_path / name).write_bytes(b"P5 28 28 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), np.stack([grey] * 3, -1))


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel: [H, W, 3] uint16. PIL writes none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_sixteen_bits_of_colour_keep_their_high_byte(tmp_path, colour):
    (tmp_path / "a.png").write_bytes(png16(colour.astype(np.uint16) * 256 + 99))
    assert np.array_equal(pixels(tmp_path / "a.png"), colour)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (12, 9), name) for name in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.webp"):
        frames[0].save(
            tmp_path / name,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if name == "a.webp" else {}),
        )
        assert (pixels(tmp_path / name) == [255, 0, 0]).all()


def test_the_orientation_of_a_camera_is_not_applied(tmp_path):
    image = Image.new("RGB", (16, 8), "white")
    ImageDraw.Draw(image).rectangle((0, 0, 7, 7), fill="black")
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = pixels(tmp_path / "a.jpg")
    assert found.shape == (8, 16, 3)
    assert found[:, :4].mean() < 20 < 230 < found[:, 12:].mean()


def bomb(tmp_path, colour):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    good = png16(colour.astype(np.uint16))
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return good[:16] + header + crc + good[33:]


def truncated(tmp_path, colour):
    Image.fromarray(colour).resize((200, 200)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    return content[: len(content) // 2]


def truncated_png(tmp_path, colour):
    content = png16(colour.astype(np.uint16) * 77)
    return content[: len(content) - 400]


BROKEN = {
    "truncated JPEG": (truncated, "truncated"),
    "truncated PNG": (truncated_png, "truncated|broken"),
    "text": (lambda *_: b"<html>404 Not Found</html>\n", "none of JPEG, PNG, GIF"),
    "nothing": (lambda *_: b"", "empty file"),
    "half a header": (lambda *_: b"\x89PNG\r\n\x1a\n\0\0\0\rIH", "."),
    "postscript": (lambda *_: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of"),
    "decompression bomb": (bomb, "decompression bomb"),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_what_is_no_whole_image_is_one_line_that_names_the_file(tmp_path, colour, kind):
    make, reason = BROKEN[kind]
    path = tmp_path / "a.jpg"
    path.write_bytes(make(tmp_path, colour))
    with pytest.raises(DecodeError, match=reason) as caught:
        open_image(path)
    assert str(caught.value).startswith(f"{path} cannot be decoded (")
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_missing_file_are_named_too(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(DecodeError, match=r"cannot be read .*directory"):
        open_image(tmp_path / "a.jpg")
    with pytest.raises(DecodeError, match="No such file"):
        open_image(tmp_path / "b.jpg")


@pytest.mark.parametrize("values", [np.float32([[0.5, 1.0]]), np.int32([[1, 100_000]])])
def test_pixels_without_a_known_white_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DecodeError, match="which value is white is not known"):
        open_image(tmp_path / "a.tif")


def test_a_path_is_one_line_whatever_its_name_holds():
    assert shown("a\nb\udcff.jpg") == r"'a\nb\udcff.jpg'"
    assert shown("é 1.jpg") == "é 1.jpg"
