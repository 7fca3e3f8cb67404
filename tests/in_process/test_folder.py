"""Folders as people keep them: any picture format, masks and captions beside, one sentence for what cannot be read."""

import os

import numpy as np
import pytest
import torch
from concepts_pack.training.folder import ALL, fingerprint, pictures_in, read_folder
from PIL import Image, PngImagePlugin

LINKS = pytest.mark.skipif(os.name == "nt", reason="links need a right there")
RED = Image.new("RGB", (48, 40), (255, 0, 0))


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def only(folder):
    (photo,) = read_folder(folder)
    return photo


def test_photos_masks_and_captions_in_order(folder):
    for name in ("b.png", "a.jpg", "c.webp"):
        RED.save(folder / name)
    (folder / "b.txt").write_text(" a red {} \n", "utf-8")
    Image.linear_gradient("L").resize((48, 40)).save(folder / "b.mask.png")
    first, second, third = read_folder(folder)
    assert [p.caption for p in (first, second, third)] == ["", "a red {}", ""]
    assert first.mask is None and second.mask.shape == (40, 48) and second.mask[-1].min() > 0.9
    assert first.picture.shape == (40, 48, 3) and first.picture[..., 0].min() > 0.95


@pytest.mark.parametrize(("image", "ending"), [
    (RED.convert("L"), "png"), (RED.convert("P"), "png"), (RED.convert("1"), "png"), (RED.convert("CMYK"), "jpg"),
    (Image.fromarray(np.full((40, 48), 40000, np.uint16)), "png"), (RED, "bmp"), (RED, "tiff"),
])
def test_every_kind_of_pixel(folder, image, ending):
    image.save(folder / f"x.{ending}")
    photo = only(folder)
    assert photo.picture.shape == (40, 48, 3) and 0 <= photo.picture.min() <= photo.picture.max() <= 1
    assert photo.picture.max() > 0.2 and photo.mask is None


def test_sixteen_bits_keep_their_brightness(folder):
    Image.fromarray(np.full((40, 48), 32896, np.uint16)).save(folder / "x.png")
    assert only(folder).picture.mean().item() == pytest.approx(128 / 255, abs=0.01)


def test_photos_of_a_camera_are_made_no_larger_than_training_uses(folder):
    wide = Image.linear_gradient("L").resize((3300, 2200))
    wide.convert("RGB").save(folder / "x.jpg", quality=95)
    wide.save(folder / "x.mask.png", compress_level=1)
    picture, mask = only(folder).picture, only(folder).mask
    assert picture.shape == (2048, 3072, 3) and mask.shape == (2048, 3072)
    there = torch.arange(2048) / 2047
    for found in (picture[:, 1000, 1], mask[:, 1000]):
        torch.testing.assert_close(found, there, atol=0.02, rtol=0)


def test_alpha_is_the_mask(folder):
    image = RED.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((48, 40)))
    image.save(folder / "x.png")
    assert only(folder).mask.min() < 0.1 and only(folder).mask.max() > 0.9


def test_a_caption_may_begin_with_the_mark_of_utf8(folder):
    RED.save(folder / "x.png")
    (folder / "x.txt").write_text("a café {}", "utf-8-sig")
    assert only(folder).caption == "a café {}"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_caption_in_another_encoding_is_told(folder, encoding):
    RED.save(folder / "x.png")
    (folder / "x.txt").write_text("a café {}", encoding)
    with pytest.raises(ValueError, match=r"x\.txt is not text in UTF-8; save it again"):
        read_folder(folder)


def test_names_in_capitals_and_hidden_files(folder):
    RED.save(folder / "IMG_1.JPG")
    Image.linear_gradient("L").resize((48, 40)).save(folder / "IMG_1.MASK.PNG")
    (folder / "IMG_1.TXT").write_text("a {} outside", "utf-8")
    (folder / "._IMG_1.JPG").write_bytes(b"of macOS")
    assert only(folder).mask is not None and only(folder).caption == "a {} outside"


@LINKS
def test_what_a_linked_subfolder_holds_counts(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    RED.save(elsewhere / "a.png")
    (folder / "10_cat").symlink_to(elsewhere)
    before = fingerprint(folder)
    RED.save(elsewhere / "b.png")
    assert len(read_folder(folder)) == 2 and fingerprint(folder) != before


def test_a_picture_of_floating_point_numbers_is_told(folder):
    Image.fromarray(np.full((40, 48), 0.5, np.float32)).save(folder / "x.tiff")
    with pytest.raises(ValueError, match=r"x\.tiff holds floating-point numbers; save it as PNG"):
        read_folder(folder)


@pytest.mark.parametrize("shade", [0, 255])
def test_a_mask_that_says_nothing_is_none(folder, shade):
    RED.save(folder / "x.png")
    Image.new("L", RED.size, shade).save(folder / "x.mask.png")
    assert only(folder).mask is None


def test_an_animation_gives_its_first_frame(folder):
    RED.save(folder / "x.gif", save_all=True, append_images=[Image.new("RGB", (48, 40), (0, 0, 255))])
    assert only(folder).picture[0, 0].tolist() == pytest.approx([1, 0, 0], abs=0.05)


def test_a_phone_photo_stands_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    RED.save(folder / "x.jpg", exif=exif)
    assert only(folder).picture.shape == (48, 40, 3)


def test_subfolders_with_a_number_repeat(folder):
    (folder / "3_cat").mkdir()
    (folder / "notes").mkdir()
    for path in ("x.png", "3_cat/y.png", "notes/z.png"):
        RED.save(folder / path)
    photos = read_folder(folder)
    assert len(photos) == 4
    assert len({photo.picture.data_ptr() for photo in photos}) == 2  # repeats share their pixels


@pytest.mark.parametrize(("names", "counts"), [
    (("20_cat",), [1]), (("4_cat", "6_dog"), [2, 3]), (("0_cat", "5_dog"), [0, 1]), (("0_cat",), [0]),
])
def test_repeats_are_only_their_ratio(folder, names, counts):
    for name in names:
        (folder / name).mkdir()
        RED.save(folder / name / "x.png")
    found = [path.parent.name for path in pictures_in(folder)]
    assert [found.count(name) for name in names] == counts


@pytest.mark.parametrize("name", ["2024_summer", "20240712_trip"])
def test_years_and_dates_are_no_numbers_of_repeats(folder, name):
    (folder / name).mkdir()
    for path in ("x.png", f"{name}/y.png"):
        RED.save(folder / path)
    assert len(read_folder(folder)) == 1


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"0" * 40])
def test_an_unreadable_picture_is_named(folder, content):
    (folder / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match="bad.png cannot be read as a picture"):
        read_folder(folder)


def test_a_cut_off_picture_is_named(folder):
    RED.resize((400, 400)).save(folder / "cut.jpg")
    data = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="cut.jpg cannot be read as a picture"):
        read_folder(folder)


@pytest.mark.parametrize("names", [("x.mask.PNG", "x.Txt"), ("x.Mask.png", "x.TXT"), ("x_MASK.PNG", "x.txt")])
def test_endings_in_capitals(folder, names):
    RED.save(folder / "x.png")
    Image.linear_gradient("L").resize(RED.size).save(folder / names[0], "PNG")
    (folder / names[1]).write_text("a red one")
    assert only(folder).mask is not None and only(folder).caption == "a red one"


def test_a_folder_called_like_a_caption_is_none(folder):
    RED.save(folder / "x.png")
    (folder / "x.txt").mkdir()
    assert only(folder).caption == ""


def test_a_tiny_picture_is_named(folder):
    RED.resize((40, 31)).save(folder / "x.png")
    with pytest.raises(ValueError, match="x.png is 40×31 pixels; at least 32 a side are needed"):
        read_folder(folder)


@LINKS
def test_a_link_to_nothing_is_named(folder):
    (folder / "x.png").symlink_to(folder / "gone.png")
    assert fingerprint(folder)
    with pytest.raises(ValueError, match="x.png cannot be read as a picture"):
        read_folder(folder)


def test_a_picture_with_endless_text_is_named(folder):
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    RED.save(folder / "x.png", pnginfo=text)
    with pytest.raises(ValueError, match="x.png cannot be read as a picture"):
        read_folder(folder)


def test_a_photo_of_a_mask_is_a_photo(folder):
    for name in ("venetian_mask.png", "hockey.JPG", "hockey_mask.png"):
        RED.save(folder / name)
    assert [path.name for path in pictures_in(folder)] == ["hockey.JPG", "venetian_mask.png"]


def test_a_mask_of_another_size_is_named(folder):
    RED.save(folder / "x.png")
    Image.new("L", (10, 10)).save(folder / "x_mask.png")
    with pytest.raises(ValueError, match="x_mask.png is 10×10 pixels, x.png 48×40"):
        read_folder(folder)


def test_an_empty_folder_is_named(folder):
    with pytest.raises(ValueError, match="There are no pictures in"):
        read_folder(folder)


def test_any_change_is_noticed(folder):
    RED.save(folder / "x.png")
    before = fingerprint(folder)
    assert before == fingerprint(folder)
    os.utime(folder / "x.png", (1, 1))
    touched = fingerprint(folder)
    (folder / "x.txt").write_text("a cat")
    captioned = fingerprint(folder)
    RED.convert("L").save(folder / "x.mask.png")
    assert len({before, touched, captioned, fingerprint(folder)}) == 4


def test_what_is_not_read_changes_nothing(folder):
    RED.save(folder / "x.png")
    before = fingerprint(folder)
    for name in ("rejects", ".cache"):
        (folder / name).mkdir()
        RED.save(folder / name / "y.png")
    RED.save(folder / "._x.png")
    assert fingerprint(folder) == before != fingerprint(folder, ALL)


def test_what_a_file_manager_leaves_changes_nothing(folder):
    (folder / "b").mkdir()
    RED.save(folder / "b" / "x.png")
    before = fingerprint(folder)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "b/.DS_Store"):
        (folder / name).write_bytes(b"x")
    assert fingerprint(folder) == before


def test_pictures_are_ordinary_tensors(folder):
    RED.save(folder / "x.png")
    assert only(folder).picture.dtype == torch.float32
