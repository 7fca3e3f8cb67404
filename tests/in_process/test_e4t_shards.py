"""Encoded subjects on disk: reading goes on where it was stopped, and gives what all of them in memory would."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from concepts_pack.e4t.pretrain import Keeping, pretrain
from concepts_pack.e4t.samples import draw_pair, read_samples
from PIL import Image

from . import ranks
from .conftest import WIDTH
from .ranks import in_memory

COUNT, BROKEN = 150, (3, 100)  # pictures, in three shards, two of which have one that cannot be read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "cats"
    folder.mkdir()
    for number in range(COUNT):
        Image.new("RGB", (64, 48), (number, 90, 255 - number)).save(folder / f"{number:03d}.png")
    for number in BROKEN:
        (folder / f"{number:03d}.png").write_bytes(b"no picture")
    return folder


class Stop(BaseException):
    pass


class Encode:
    """Counts the subjects it encodes, and stops at one of them."""

    def __init__(self, stop_at=0):
        self.done, self.stop_at = 0, stop_at

    def __call__(self, pictures):
        self.done += 1
        if self.done == self.stop_at:
            raise Stop
        return pictures.permute(0, 3, 1, 2)[:, :, ::8, ::8].repeat(1, 2, 1, 1)[:, :4]


def read(folder, work, encode=None, vae="vae"):
    return read_samples(folder, 2, 64, 32, False, 0.1, 0, encode or Encode(), vae, work)


def assert_same(one, two):
    one, two = vars(in_memory(one)), vars(in_memory(two))
    for name, value in one.items():
        assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name], name


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    return read(folder, tmp_path_factory.mktemp("whole"))


def test_subjects_are_in_the_order_of_their_names(whole):
    reds = in_memory(whole).pictures[:, 0, 16, 16, 0].tolist()
    assert reds == [number for number in range(COUNT) if number not in BROKEN]


def test_a_stopped_reading_goes_on(folder, whole, tmp_path):
    with pytest.raises(Stop):
        read(folder, tmp_path, Encode(stop_at=90))
    encode, again = Encode(), Encode()
    samples = read(folder, tmp_path, encode)
    assert encode.done == COUNT - 64 - 1 and samples.unreadable == len(BROKEN)
    assert_same(samples, whole)
    read(folder, tmp_path, again)
    assert again.done == 0
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("samples-cats-")
    assert sorted(path.name for path in kept.iterdir()) == [f"0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:len(whole) // 2], lambda whole: whole[:4], lambda whole: b"", lambda whole: b"\xff" * 99,
])
def test_a_damaged_shard_is_made_anew(folder, whole, tmp_path, damage):
    samples = read(folder, tmp_path)
    (path,) = tmp_path.rglob("00002-of-00003.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="00002-of-00003.safetensors is not a readable safetensors file"):
        in_memory(samples)
    encode = Encode()
    assert_same(read(folder, tmp_path, encode), whole)
    assert encode.done == 63


def test_a_shard_may_have_no_picture_that_can_be_read(tmp_path):
    (tmp_path / "cats").mkdir()
    for number in range(65):
        (tmp_path / "cats" / f"{number:03d}.png").write_bytes(b"no picture")
    Image.new("RGB", (64, 48)).save(tmp_path / "cats" / "064.png")
    for _ in range(2):
        samples = read(tmp_path / "cats", tmp_path)
        assert samples.latents.shape == (1, 2, 4, 8, 8) and samples.unreadable == 64


def test_files_that_are_not_read_change_nothing(tmp_path):
    folder, work = tmp_path / "cats", tmp_path / "work"
    (folder / "b").mkdir(parents=True)
    for name in ("a.png", "b/1.png"):
        Image.new("RGB", (64, 48)).save(folder / name)
    first = read(folder, work)
    for name in ("Thumbs.db", "b/.DS_Store", "b/1.txt", "a-empty/desktop.ini"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    encode = Encode()
    again = read(folder, work, encode)
    assert encode.done == 0 and again.source == first.source
    Image.new("L", (64, 48), 255).save(folder / "b" / "1.mask.png")
    assert read(folder, work).source != first.source


def test_other_settings_are_kept_apart(folder, tmp_path):
    for vae in ("one", "two"):
        encode = Encode()
        read(folder, tmp_path, encode, vae)
        assert encode.done == COUNT - len(BROKEN)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("rows", [slice(None), slice(1, None, 2)])
def test_draws_are_those_of_samples_in_memory(whole, rows):
    for part in ((0, 140), (140, 148)):
        for step in range(12):
            one, two = (vars(draw_pair(samples.part(*part), 1000, 16, 0, step, rows))
                        for samples in (whole, in_memory(whole)))
            one, two = one | vars(one.pop("batch")), two | vars(two.pop("batch"))
            assert one.keys() == two.keys()
            for name, value in one.items():
                assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name], name


def test_a_domain_learns_the_same_from_them(model, clip, whole, tmp_path):
    one, two = (pretrain(model, clip, samples, ranks.RECIPE, Keeping(tmp_path), torch.eye(WIDTH))
                for samples in (whole, in_memory(whole)))
    assert len({path.name.split("-step")[0] for path in tmp_path.iterdir()}) == 2  # each from its own start
    for name, tensor in one.encoder.state_dict().items():
        assert torch.equal(tensor, two.encoder.state_dict()[name]), name


def test_memory_does_not_grow_with_the_folder(tmp_path):
    script = Path(__file__).with_name("flat.py")
    said = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=600, check=True)
    grown, kept = map(int, said.stdout.split()[-2:])
    assert kept > 170e6 and grown < 0.25 * kept
