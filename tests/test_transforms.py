"""Pictures become tensors as the published encoders expect them; each kind of file is read right or refused by name."""

import struct
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from nanovlm.data.transforms import CLIP_MEAN, CLIP_STD, Transform, load_image, to_rgb
from nanovlm.errors import UserError

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # leaves pixels / 255


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom: a pixel's colour says where it was."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 128)], axis=-1).round().astype(np.uint8))


@given(st.integers(7, 90), st.integers(7, 90), st.sampled_from([7, 24, 61]))
@settings(max_examples=40, deadline=None)
def test_crop_is_clips_own_preprocessing(width, height, size):
    theirs = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    image = noise(width, height, seed=width * 1000 + height)
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(Transform(size)(image), expected, rtol=0, atol=1e-5)


def test_stretch_shows_everything_and_pad_keeps_the_proportions():
    wide = ramp(80, 20)
    stretched = Transform(40, fit="stretch", **RAW)(wide)
    assert stretched[0, 20, 0] < 0.05 and stretched[0, 20, -1] > 0.95  # both ends are there
    assert stretched[1, 0, 20] < 0.1 and stretched[1, -1, 20] > 0.9
    expected = np.asarray(wide.resize((40, 40), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(stretched.numpy(), expected, atol=1e-6)

    padded = Transform(40, fit="pad")(wide)  # 80 x 20 becomes 40 x 10 in the middle, rows 15 to 24
    margin = torch.cat([padded[:, :13], padded[:, 27:]], dim=1)
    assert margin.abs().max() < 1 / 255 / min(CLIP_STD) + 1e-6  # the mean colour is 0 up to its rounding to bytes
    inside = padded * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
    assert inside[0, 20, 0] < 0.05 and inside[0, 20, -1] > 0.95
    assert inside[1, 15, 20] < 0.25 and inside[1, 24, 20] > 0.75


def test_an_unknown_fit_names_the_valid_ones():
    with pytest.raises(UserError, match="fit is 'squash'; it must be one of crop, pad, stretch"):
        Transform(8, fit="squash")


def test_augment_crops_60_to_100_percent_anywhere_and_flips_half_of_the_time():
    transform, image, rng = Transform(31, augment=True, **RAW), ramp(120, 90), Random(0)
    flips, areas, corners = 0, [], []
    for _ in range(400):
        x, y = transform(image, rng)[:2]
        flips += bool(x[15, 0] > x[15, -1])
        # from the centres of the first and last pixel back to the whole box
        width, height = (abs(x[15, -1] - x[15, 0]) * 120 * 31 / 30, abs(y[-1, 15] - y[0, 15]) * 90 * 31 / 30)
        areas.append(float(width * height) / 90**2)
        corners.append(float(x[15].min()))
    assert 150 < flips < 250  # 200 expected, standard deviation 10: a false alarm once in 2 million runs
    assert 0.57 < min(areas) < 0.66 and 0.94 < max(areas) < 1.03
    assert min(corners) < 0.03 and max(corners) > 0.3


def test_augment_is_driven_by_its_generator_only():
    transform, image = Transform(9, augment=True), noise(20, 30)
    first, again, other = (transform(image, Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- modes


def test_transparency_becomes_white():
    half = Image.new("RGBA", (5, 7), (200, 0, 100, 0))
    half.putpixel((2, 3), (200, 0, 100, 255))
    half.putpixel((3, 3), (200, 0, 100, 51))
    grey_alpha = Image.new("LA", (5, 7), (0, 0))
    palette = Image.new("P", (5, 7), 1)
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.info["transparency"] = 1
    for image in (half, grey_alpha, palette):
        rgb = to_rgb(image)
        assert rgb.mode == "RGB" and rgb.getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(half).getpixel((2, 3)) == (200, 0, 100)
    assert to_rgb(half).getpixel((3, 3)) == (244, 204, 224)  # 255 + (colour - 255) / 5


def test_other_modes_keep_their_colours():
    palette = Image.new("P", (5, 7), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert to_rgb(palette).getpixel((1, 1)) == (40, 50, 60)
    assert to_rgb(Image.new("L", (5, 7), 77)).getpixel((1, 1)) == (77, 77, 77)
    assert to_rgb(Image.new("1", (5, 7), 1)).getpixel((1, 1)) == (255, 255, 255)
    assert to_rgb(Image.new("CMYK", (5, 7), (0, 0, 0, 0))).getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 35).round().astype(np.uint16).reshape(7, 5)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = np.asarray(load_image(tmp_path / "deep.png"))
    assert pixels.shape == (7, 5, 3)
    np.testing.assert_allclose(pixels[..., 0], values / 257, atol=0.51)


def test_a_16_bit_or_palette_file_gives_what_its_8_bit_rgb_twin_gives(tmp_path):
    twin = ramp(30, 20).quantize(64)
    twin.save(tmp_path / "palette.png")
    twin.convert("RGB").save(tmp_path / "rgb.png")
    transform = Transform(13)
    assert torch.equal(transform(load_image(tmp_path / "palette.png")), transform(load_image(tmp_path / "rgb.png")))


# ---- files


def test_exif_orientation_is_followed(tmp_path):
    image = Image.new("RGB", (16, 24), (255, 255, 255))
    image.paste((255, 0, 0), (0, 0, 16, 8))  # red above
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright"
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = load_image(tmp_path / "turned.jpg")
    assert upright.size == (24, 16)
    red, white = upright.getpixel((22, 8)), upright.getpixel((2, 8))  # above went to the right
    assert red[0] > 200 and red[1] < 60 and min(white) > 200


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_pillows(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(16, 24).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        expected = ImageOps.exif_transpose(image)
    assert load_image(tmp_path / "turned.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize(("kind", "count", "value"), [(2, 4, b"abc\0"), (5, 3, b"\xff\xff\xff\xff"), (99, 1, b"abcd")])
def test_a_tag_of_a_wrong_type_beside_the_orientation(tmp_path, kind, count, value):
    """GPS latitude (tag 2 of the block 0x8825) as text, as numbers that are not there, as nothing known."""
    tags = struct.pack("<HHHII", 2, 0x0112, 3, 1, 6) + struct.pack("<HHIII", 0x8825, 4, 1, 38, 0)
    gps = struct.pack("<HHHI", 1, 2, kind, count) + value + struct.pack("<I", 0)
    noise(16, 24).save(tmp_path / "turned.jpg", exif=b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags + gps)
    assert load_image(tmp_path / "turned.jpg").size == (24, 16)


@pytest.mark.parametrize("tags", [b"II*", b"II*\0", b"no tags"])
def test_tags_that_cannot_be_read_say_nothing(tmp_path, tags):
    noise(16, 24).save(tmp_path / "odd.png", exif=b"Exif\0\0" + tags)
    assert load_image(tmp_path / "odd.png").size == (16, 24)


def test_side_makes_the_shorter_side_small_and_keeps_the_proportions(tmp_path):
    ramp(400, 200).save(tmp_path / "wide.jpg", quality=95)
    small = load_image(tmp_path / "wide.jpg", side=40)
    assert small.size == (80, 40)
    assert small.getpixel((0, 20))[0] < 10 and small.getpixel((79, 20))[0] > 245
    assert load_image(tmp_path / "wide.jpg", side=500).size == (400, 200)  # never enlarged


def test_the_content_decides_not_the_name(tmp_path):
    noise(5, 7).save(tmp_path / "really_a_png.png")
    (tmp_path / "really_a_png.png").rename(tmp_path / "really_a_png.jpg")
    assert load_image(tmp_path / "really_a_png.jpg").tobytes() == noise(5, 7).tobytes()


def broken_files(folder):
    noise(40, 40).save(folder / "whole.jpg")
    noise(40, 40).save(folder / "whole.png")
    (folder / "text.jpg").write_text("I am no picture")
    (folder / "empty.png").write_bytes(b"")
    for name in ("jpg", "png"):
        content = (folder / f"whole.{name}").read_bytes()
        (folder / f"cut.{name}").write_bytes(content[: len(content) // 2])
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    (folder / "clip.png").write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(100))
    (folder / "folder.png").mkdir()
    return {
        "text.jpg": "no known picture format", "empty.png": "it is empty", "cut.jpg": "cannot be read",
        "cut.png": "cannot be read", "folder.png": "cannot be read", "absent.png": "missing",
        "photo.heic": "it is a HEIC photo, .* convert it, as with `magick photo.heic photo.jpg`", "clip.png": "it is a video",
    }


def test_every_broken_file_is_one_sentence_that_names_it(tmp_path):
    for name, said in broken_files(tmp_path).items():
        for side in (None, 8):
            with pytest.raises(UserError, match=f"{name}: the picture .*{said}"):
                load_image(tmp_path / name, side)
