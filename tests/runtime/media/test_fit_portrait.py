import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import one_line
from PIL import Image

from factorportrait.errors import MediaError
from factorportrait.runtime.media.fit import Box, Fit, crop_box, natural_key, square_crop
from factorportrait.runtime.media.portrait import load_portrait, read_image

sizes = st.integers(40, 900)


@settings(max_examples=200, deadline=None)
@given(
    sizes, sizes, st.sampled_from([32, 64, 100, 101]), st.sampled_from([32, 64, 100]), st.sampled_from(["crop", "pad"])
)
def test_fit_stays_inside_and_never_stretches(h, w, height, width, fit):
    move = Fit.between(h, w, height, width, fit)
    assert move.left >= -1e-9 and move.top >= -1e-9
    assert move.left + move.content_width / move.scale <= w * (1 + 1e-9) + 1e-6
    assert move.top + move.content_height / move.scale <= h * (1 + 1e-9) + 1e-6
    if fit == "crop":
        assert (move.content_height, move.content_width) == (height, width)
    else:
        # everything but less than one output pixel is visible, and one direction is full
        assert w - move.content_width / move.scale < 1 / move.scale + 1e-6
        assert h - move.content_height / move.scale < 1 / move.scale + 1e-6
        assert move.content_height == height or move.content_width == width


@settings(max_examples=50, deadline=None)
@given(sizes, sizes, st.sampled_from(["crop", "pad"]), st.floats(-0.4, 0.4), st.floats(-0.4, 0.4))
def test_intrinsics_move_like_the_picture(h, w, fit, x, y):
    """A bright spot drawn where a 3-D point projects lies where the moved K projects it."""
    move = Fit.between(h, w, 64, 64, fit)
    K = np.array([[0.9 * w, 0, 0.55 * w], [0, 0.9 * w, 0.45 * h], [0, 0, 1]])
    u, v, _ = K @ [x, y, 1]
    u2, v2, _ = move.intrinsics(K) @ [x, y, 1]
    assert u2 == pytest.approx((u - move.left) * move.scale + move.x)
    assert v2 == pytest.approx((v - move.top) * move.scale + move.y)
    assert move.intrinsics(K)[0, 0] / K[0, 0] == pytest.approx(move.intrinsics(K)[1, 1] / K[1, 1])


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pixels_follow_the_intrinsics(fit):
    image = np.zeros((300, 500, 3), np.uint8)
    image[140:150, 230:240] = 255
    move = Fit.between(300, 500, 100, 100, fit)
    output = move.apply(image)[..., 0].astype(float)
    rows, columns = np.mgrid[0:100, 0:100] + 0.5
    found = [(output * columns).sum() / output.sum(), (output * rows).sum() / output.sum()]
    assert found == pytest.approx(
        [(235 - move.left) * move.scale + move.x, (145 - move.top) * move.scale + move.y], abs=0.05
    )


def test_square_crop_and_box():
    frame = np.zeros((100, 200, 3), np.uint8)
    frame[:, 50:150] = 200
    # the filter reaches a little over the edge
    assert square_crop(frame, 32)[:, 2:-2].min() > 195
    assert square_crop(frame, 32, Box(0, 0, 45, 45)).max() == 0
    with pytest.raises(MediaError) as error:
        square_crop(frame, 32, Box(150, 0, 60, 50))
    one_line(error.value, "200x100")
    assert crop_box("1,2,3.5,4") == Box(1, 2, 3.5, 4)
    for bad in ("1,2,3", "a,b,c,d", "0,0,0,5", "-1,0,5,5", "nan,0,5,5"):
        with pytest.raises(MediaError) as error:
            crop_box(bad)
        one_line(error.value, "crop")


def test_downscaling_is_antialiased():
    board = np.zeros((256, 256, 3), np.uint8)
    board[::2] = 255
    assert np.abs(square_crop(board, 32).astype(int) - 128).max() < 8


def test_natural_order():
    assert sorted(["f10.png", "f2.png", "F1.png", "a.png"], key=natural_key) == ["a.png", "F1.png", "f2.png", "f10.png"]
    # Superscripts are digits without being decimal; digits of other scripts are both.
    assert sorted(["1²2.png", "1²10.png", "1.png"], key=natural_key) == ["1.png", "1²2.png", "1²10.png"]
    assert sorted(["f١٠.png", "f٢.png"], key=natural_key) == ["f٢.png", "f١٠.png"]


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (120, 80))
    image.paste((255, 0, 0), (0, 0, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "p.png", exif=exif)
    array = read_image(tmp_path / "p.png")
    assert array.shape == (120, 80, 3)
    assert array[5, 75].tolist() == [255, 0, 0] and array[5, 5].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (200, 100, 50, 128), (100, 50, 25)),
        ("LA", (200, 0), (0, 0, 0)),
        ("P", 3, None),
        ("I;16", 25700, (100, 100, 100)),
    ],
)
def test_modes(tmp_path, mode, value, expected):
    image = Image.new(mode, (90, 90), value)
    if mode == "P":
        image.putpalette([0, 0, 0] * 3 + [10, 20, 30] + [0, 0, 0] * 252)
        expected = (10, 20, 30)
    image.save(tmp_path / "m.png")
    array = load_portrait(tmp_path / "m.png", 64, 64)
    assert array.dtype == np.uint8 and array.shape == (64, 64, 3)
    assert np.abs(array.astype(int) - expected).max() <= 1


def test_palette_with_transparency_and_cmyk_and_webp(tmp_path):
    palette = Image.new("P", (70, 70), 0)
    palette.putpalette([255, 255, 255] + [0] * 765)
    palette.save(tmp_path / "t.png", transparency=0)
    assert read_image(tmp_path / "t.png").max() == 0
    Image.new("CMYK", (70, 70), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=95)
    red = read_image(tmp_path / "c.jpg")[30, 30]
    assert red[0] > 180 and red[1] < 90
    Image.new("RGB", (70, 70), (9, 200, 9)).save(tmp_path / "w.webp")
    assert read_image(tmp_path / "w.webp")[30, 30, 1] > 180


def test_fit_of_a_tall_portrait_keeps_the_head(tmp_path):
    tall = np.zeros((300, 100, 3), np.uint8)
    tall[:, :, 0] = np.arange(300)[:, None] * 255 // 299
    Image.fromarray(tall).save(tmp_path / "tall.png")
    cropped = load_portrait(tmp_path / "tall.png", 64, 64)
    # 200 surplus rows: a third above, so row 66.7 comes first
    assert cropped[0, 32, 0] == pytest.approx(67 * 255 / 299, abs=3)
    padded = load_portrait(tmp_path / "tall.png", 64, 64, fit="pad")
    assert padded[:, :20].max() == 0 and padded[:, 31].max() > 240


def test_refusals(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("hello")
    Image.new("RGB", (63, 200)).save(tmp_path / "tiny.png")
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:5000])
    (tmp_path / "empty.jpg").write_bytes(b"")
    cases = {
        "missing.png": "no such file",
        "text.png": "something else",
        "empty.jpg": "0 bytes",
        "tiny.png": "at least 64 pixels",
        "cut.jpg": "whole picture",
        ".": "a folder",
    }
    for name, words in cases.items():
        with pytest.raises(MediaError) as error:
            load_portrait(tmp_path / name, 64, 64)
        one_line(error.value, words, str(tmp_path))
    with pytest.raises(MediaError) as error:
        load_portrait(tmp_path / "whole.jpg", 64, 64, fit="stretch")
    one_line(error.value, "crop or pad")
    monkeypatch.setattr("factorportrait.runtime.media.portrait.MAX_PIXELS", 10_000)
    with pytest.raises(MediaError) as error:
        load_portrait(tmp_path / "whole.jpg", 64, 64)
    one_line(error.value, "too large", "200x200")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(MediaError) as error:
        load_portrait(tmp_path / "whole.jpg", 64, 64)
    one_line(error.value, "too large")
