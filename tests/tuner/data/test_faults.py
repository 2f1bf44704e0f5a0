"""What pictures and data sets have wrong in the wild: each is refused for what it is, or read as it is meant."""

import io
import json
import os
import shutil
import socket
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tuner.data.test_images import array, chunk, chunks, profile, quadrants
from tuner.data.buckets import Buckets
from tuner.data.cache import Cache
from tuner.data.encode import Encoded
from tuner.data.images import Pictures, is_transparent, load_picture, upright_size
from tuner.data.sources.folder import PictureFolder
from tuner.data.sources.table import Table
from tuner.errors import DataError, UnsafeError

# Files that are damaged or cannot be read


@contextmanager
def without_rights() -> Iterator[Path]:
    """A folder of a user who is not root, to whom rights mean something."""
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    if user == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)


def test_pictures_and_folders_that_may_not_be_read_are_named_and_not_left_out():
    with without_rights() as folder:
        for name in ("a", "b", "c"):
            quadrants().save(folder / f"{name}.png")
        (folder / "b.png").chmod(0)
        with pytest.raises(DataError, match=r"^\S*b.png: not a readable picture \(.*denied.*\); replace or remove it$"):
            PictureFolder(path=folder, prompt="a thing").examples()
        (folder / "b.png").unlink()
        (folder / "more").mkdir()
        quadrants().save(folder / "more" / "d.png")
        (folder / "more").chmod(0)
        with pytest.raises(DataError, match=r"^\S*more: cannot be read \(Permission denied\)"):
            PictureFolder(path=folder, prompt="a thing").examples()
        (folder / "more").chmod(0o700)
        assert len(PictureFolder(path=folder, prompt="a thing").examples()) == 3


@pytest.mark.parametrize("missing", [1, 12, 16])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "avif"])
def test_a_picture_whose_end_is_missing_is_refused(suffix, missing, tmp_path: Path):
    """Also where every pixel is there: what was cut off once may be cut off again."""
    file = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    whole = file.read_bytes()
    assert load_picture(file, "white").size == upright_size(file) == (64, 64)
    file.write_bytes(whole[:-missing])
    if suffix == "png" and missing == 1:  # of the end's own check sum, behind which nothing can be missing
        assert load_picture(file, "white").size == (64, 64)
        return
    with pytest.raises(DataError, match=rf"cut.{suffix}: not a readable picture \("):
        upright_size(file)
        load_picture(file, "white")


@pytest.mark.parametrize("level", [0, 6])
def test_no_changed_bit_of_a_png_gives_other_pixels(level, tmp_path: Path):
    file = tmp_path / "changed.png"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    noise.save(file, compress_level=level)
    whole, refused = file.read_bytes(), 0
    for at in range(8, len(whole), 3):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        file.write_bytes(changed)
        try:
            assert array(load_picture(file, "white")).tolist() == array(noise).tolist()
        except DataError:
            refused += 1
    assert refused > 0.9 * len(range(8, len(whole), 3))


# Colours


def lab(colour: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB colours from 0 to 255."""
    shares = colour / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The colour difference of CIE 1976."""
    return np.linalg.norm(lab(one.astype(float)) - lab(other.astype(float)), axis=-1)


SRGB = np.array([[0.4360, 0.2225, 0.0139], [0.3851, 0.7169, 0.0971], [0.1431, 0.0606, 0.7141]])
ADOBE = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
"""XYZ (D50) of the primaries, one a row: IEC 61966-2-1, and Adobe RGB (1998) Color Image Encoding, 2005."""


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_colours_in_adobe_rgb_are_within_3_of_what_they_mean(suffix, tmp_path: Path):
    shares = np.stack(np.meshgrid(*[np.linspace(0.1, 0.9, 5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    linear = shares ** (563 / 256) @ ADOBE @ np.linalg.inv(SRGB)
    inside = ((linear >= 0) & (linear <= 1)).all(-1)
    meant = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.abs(linear) ** (1 / 2.4) - 0.055)[inside] * 255
    stored = np.round(shares[inside] * 255).astype(np.uint8)

    picture = Image.fromarray(stored[None].repeat(8, 0).repeat(8, 1))
    quality = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    rows = [tuple(row) for row in ADOBE.tolist()]
    picture.save(tmp_path / f"adobe.{suffix}", icc_profile=profile(*rows), **quality)
    found = array(load_picture(tmp_path / f"adobe.{suffix}", "white"))[4, 4::8]
    assert apart(found, meant).max() < 3
    assert apart(stored, meant).max() > 6  # taken for sRGB they would be far off


def ink(colours: list[tuple[float, float, float]]) -> bytes:
    """A profile (ICC.1:2001-04) by which the 16 corners of cyan, magenta, yellow and black mean colours in Lab."""
    corners = bytes(v for L, a, b in colours for v in (round(L * 2.55), round(a + 128), round(b + 128)))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    straight = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + straight * 4 + corners + straight * 3
    name = b"ink\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),
        b"A2B0": lut,
    }
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 0, b"none", 0x02400000, b"prtr", b"CMYK", b"Lab ") + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    whole = head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_inks_are_the_colours_that_their_profile_means(suffix, tmp_path: Path):
    """In this profile cyan ink is red, and magenta ink is grey; of the corners' number cyan is the highest bit."""
    white, red, grey = (100.0, 0.0, 0.0), (54.3, 80.8, 69.9), (53.6, 0.0, 0.0)
    colours = [red if corner >= 8 else grey if corner >= 4 else white for corner in range(16)]
    colours[1::2] = [(0.0, 0.0, 0.0)] * 8  # black ink is black
    inks = Image.new("CMYK", (48, 16))
    inks.paste((255, 0, 0, 0), (16, 0, 32, 16))
    inks.paste((0, 255, 0, 0), (32, 0, 48, 16))
    inks.save(tmp_path / f"inks.{suffix}", icc_profile=ink(colours), **({"quality": 100} if suffix == "jpg" else {}))
    found = array(load_picture(tmp_path / f"inks.{suffix}", "white"))[8, [8, 24, 40]]
    assert apart(found, np.array([[255, 255, 255], [255, 0, 0], [128, 128, 128]])).max() < 3


def sixteen(kind: int, channels: int, hidden: bytes | None = None) -> bytes:
    """A ramp of 256 values over 16 bits, in each channel alike."""
    values = np.zeros((16, 16, channels), ">u2")
    values[:] = np.arange(256).reshape(16, 16, 1) * 257
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, kind, 0, 0, 0))
    clear = b"" if hidden is None else chunk(b"tRNS", hidden)
    return b"\x89PNG\r\n\x1a\n" + head + clear + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_of_colour_keep_all_their_levels(tmp_path: Path):
    (tmp_path / "rgb.png").write_bytes(sixteen(2, 3))
    assert array(load_picture(tmp_path / "rgb.png", "white")).reshape(-1, 3).tolist() == [[v] * 3 for v in range(256)]


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3)])
def test_a_hidden_value_of_sixteen_bits_shows_the_background(kind, channels, tmp_path: Path):
    file = tmp_path / "hidden.png"
    file.write_bytes(sixteen(kind, channels, struct.pack(">H", 5 * 257) * channels))
    found = array(load_picture(file, "#ff0000")).reshape(-1, 3).tolist()
    assert is_transparent(file)
    assert found == [[255, 0, 0] if value == 5 else [value] * 3 for value in range(256)]


# Files that are small and claim to be large


def large_png(width: int, height: int, kind: bytes = b"", content: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    length = height * (width // 8 + 1) if width < 20_000 else 9
    rows = zlib.compress(bytes(length), 9)
    more = chunk(kind, content) if kind else b""
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def saved(kind: str, **options: object) -> bytearray:
    written = io.BytesIO()
    Image.new("RGB", (16, 16)).save(written, kind, **options)
    return bytearray(written.getvalue())


def at(data: bytearray, place: int, content: bytes) -> bytes:
    data[place : place + len(content)] = content
    return bytes(data)


def webp(side: int) -> bytes:
    data = saved("webp", exif=b"Exif\0\0..")  # which makes it of the extended kind, whose header has the size
    return at(data, data.index(b"VP8X") + 12, (side - 1).to_bytes(3, "little") * 2)


def tiff(side: int) -> bytes:
    """Black and white, all in one strip of a few bytes."""
    entries = {256: side, 257: side, 258: 1, 259: 1, 262: 1, 273: 8, 277: 1, 278: side, 279: 4}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return b"II*\0" + struct.pack("<I", 12) + bytes(4) + struct.pack("<H", len(entries)) + rows + bytes(4)


DEEP = zlib.compress(bytes(80_000_000), 9)
"""80 kB that become 80 MB."""
BOMBS: dict[str, Callable[[], bytes]] = {
    "169 megapixels.png": lambda: large_png(13_000, 13_000),
    "400 megapixels.png": lambda: large_png(20_000, 20_000),
    "text.png": lambda: large_png(8, 8, b"zTXt", b"Comment\0\0" + DEEP),
    "text of any language.png": lambda: large_png(8, 8, b"iTXt", b"Comment\0\1\0\0\0" + DEEP),
    "profile.png": lambda: large_png(8, 8, b"iCCP", b"icc\0\0" + DEEP),
    "65535.jpg": lambda: at(data := saved("jpeg"), data.index(b"\xff\xc0") + 5, b"\xff" * 4),
    "16383.webp": lambda: webp(16383),
    "65535.webp": lambda: webp(65535),
    "65535.gif": lambda: at(saved("gif"), 6, b"\xff" * 4),
    "60000.bmp": lambda: at(saved("bmp"), 18, struct.pack("<ii", 60_000, 60_000)),
    "60000.tif": lambda: tiff(60_000),
    "16384.avif": lambda: at(data := saved("avif"), data.index(b"ispe") + 8, struct.pack(">II", 16_384, 16_384)),
}


def megabytes(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(what))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_soon_and_in_little_memory(name, tmp_path: Path):
    (tmp_path / name).write_bytes(BOMBS[name]())
    assert (tmp_path / name).stat().st_size < 100_000
    Path("/proc/self/clear_refs").write_text("5")  # the most that was held is counted anew
    since, held = time.process_time(), megabytes("VmRSS")
    with pytest.raises(DataError, match=rf"{name}: "):
        PictureFolder(path=tmp_path, prompt="a thing").examples()
    assert time.process_time() - since < 2
    assert megabytes("VmHWM") - held < 100


@pytest.mark.parametrize("size", [(1, 1), (4000, 1), (9999, 9999)])
def test_sizes_that_are_odd_but_true_are_no_bombs(size, tmp_path: Path):
    (tmp_path / "odd.png").write_bytes(large_png(*size))
    (example,) = PictureFolder(path=tmp_path, prompt="a thing").examples()
    assert example.size == size


# Names


def test_pictures_of_like_names_share_nothing_in_the_cache(tmp_path: Path):
    """Of one stem, of one name in two folders, and with dots in their names."""
    names = ["a.png", "a.bmp", "x/a.png", "y/a.png", "b.c.png", "b.d.png"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / name)
    examples = PictureFolder(path=tmp_path, prompt="a thing").examples()
    encoded = Encoded(
        examples=examples,
        buckets=Buckets(resolution=64, step=8),
        pictures=Pictures(),
        cache=Cache(tmp_path / ".cache"),
        autoencoder="one",
        text_encoder=None,
    )
    assert len(examples) == len({encoded.latents_address(i, False) for i in range(len(names))}) == len(names)


def test_masks_that_could_be_of_two_pictures_or_of_one_twice_are_refused(tmp_path: Path):
    for name in ("p/a.png", "p/b.png", "m/a.png", "m/b.png", "m/b.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    source = PictureFolder(path=tmp_path / "p", prompt="a thing", masks=tmp_path / "m")
    with pytest.raises(DataError, match=r"b.(png|webp): is a mask of the same picture as b.(png|webp); remove one"):
        source.examples()
    (tmp_path / "m" / "b.webp").unlink()
    assert len(source.examples()) == 2
    Image.new("RGB", (8, 8)).save(tmp_path / "p" / "a.bmp")
    with pytest.raises(DataError, match=r"a.png: shares its mask with a.bmp; rename one of them"):
        source.examples()


# Tables that would reach elsewhere


@contextmanager
def listening() -> Iterator[tuple[int, list[object]]]:
    """A port of this machine, and who came there."""
    came: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            try:
                while True:
                    connection, address = server.accept()
                    connection.close()
                    came.append(address)
            except OSError:
                return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        port = server.getsockname()[1]
        yield port, came
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_a_table_opens_no_connection_and_says_all_that_it_refuses(tmp_path: Path):
    inside = tmp_path / "data"
    inside.mkdir()
    for name in (inside / "a.png", tmp_path / "secret.png"):
        quadrants().save(name)
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    os.mkfifo(inside / "pipe.png")
    with listening() as (port, came):
        names = ["../secret.png", "/etc/passwd", "file:///etc/passwd", f"http://127.0.0.1:{port}/x.png", "link.png"]
        absent = ["loop.png", "pipe.png", "a.png/../nothing.png"]
        rows = [json.dumps({"file_name": name, "text": "a thing"}) for name in ["a.png", *names, *absent]]
        (inside / "metadata.jsonl").write_text("\n".join(rows))
        since = time.monotonic()
        with pytest.raises(UnsafeError) as caught:
            Table(path=inside / "metadata.jsonl", unlisted="ignore").examples()
        assert time.monotonic() - since < 5 and came == []
        socket.create_connection(("127.0.0.1", port)).close()  # it would have been heard
        since = time.monotonic()
        while not came and time.monotonic() - since < 5:
            time.sleep(0.01)
        assert len(came) == 1
    lines = str(caught.value).split("\n")
    assert [f"line {2 + number}: file_name: " in line for number, line in enumerate(lines)] == [True] * 8
    assert [("is not inside" in line, "there is no file" in line) for line in lines] == [
        *[(True, False)] * len(names), *[(False, True)] * len(absent)
    ]  # fmt: skip


ROWS = {
    "a name with a NUL": ({"file_name": "a\0.png", "text": "x"}, r"file_name: there is no file 'a\\x00.png'"),
    "a name too long": ({"file_name": "x" * 5000, "text": "x"}, "file_name: there is no file 'xxx"),
    "half a character in a name": ({"file_name": "\ud800.png", "text": "x"}, "file_name: there is no file"),
    "a name of two lines": ({"file_name": "a\n.png", "text": "x"}, r"file_name: there is no file 'a\\n.png'"),
    "half a character": ({"file_name": "a.png", "text": "a \ud800"}, "text: is empty, or no text"),
    "a NUL in one of several": ({"file_name": "a.png", "text": ["a thing", "a\0"]}, "text: is empty, or no text"),
    "an object": ({"file_name": "a.png", "text": {"a": 1}}, "text: is empty, or no text"),
    "an object in a list": ({"file_name": "a.png", "text": ["a", {"a": 1}]}, "text: is empty, or no text"),
    "true": ({"file_name": "a.png", "text": True}, "text: is empty, or no text"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_that_names_no_file_or_says_no_words_is_refused_in_a_line(kind, tmp_path: Path):
    row, words = ROWS[kind]
    quadrants().save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=rf"^\S*metadata.jsonl: line 1: {words}") as caught:
        Table(path=tmp_path / "metadata.jsonl", unlisted="ignore").examples()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_alternatives_of_a_row_are_a_line_each(tmp_path: Path):
    quadrants().save(tmp_path / "a.png")
    for said, caption in (
        (["two\nlines ", "", "a  b", 5], "two lines\na b\n5"),
        ("two\r\nlines", "two\nlines"),
        (5, "5"),
    ):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": said}))
        assert Table(path=tmp_path / "metadata.jsonl").examples()[0].caption == caption


def test_the_byte_at_which_a_long_table_is_no_text_is_named(tmp_path: Path):
    quadrants().save(tmp_path / "a.png")
    line = json.dumps({"file_name": "a.png", "text": "a thing"}).encode() + b"\n"
    whole = b"\xef\xbb\xbf" + line * 1000
    (tmp_path / "metadata.jsonl").write_bytes(whole)
    assert len(Table(path=tmp_path / "metadata.jsonl").examples()) == 1000
    (tmp_path / "metadata.jsonl").write_bytes(whole + "größer".encode("latin-1"))
    with pytest.raises(DataError, match=rf"metadata.jsonl: not UTF-8 at byte {len(whole) + 2}; save it as UTF-8"):
        Table(path=tmp_path / "metadata.jsonl").examples()


def test_a_pipe_in_place_of_a_table_or_caption_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(DataError, match=r"metadata.jsonl: is no file"):
        Table(path=tmp_path / "metadata.jsonl").examples()
    quadrants().save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a.txt: is no file"):
        PictureFolder(path=tmp_path).examples()


def test_links_to_folders_are_not_followed_and_never_passed_over(tmp_path: Path):
    quadrants().save(tmp_path / "a.png")
    (tmp_path / "round").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"round: is a link to a folder, which is not followed; name that as a source"):
        PictureFolder(path=tmp_path, prompt="a thing").examples()
    (tmp_path / "round").unlink()
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"^\S*b.png: is no file; remove it, or give it another name$"):
        PictureFolder(path=tmp_path, prompt="a thing").examples()
    (tmp_path / "b.png").unlink()
    assert len(PictureFolder(path=tmp_path, prompt="a thing").examples()) == 1


def test_the_helpers_take_pngs_apart(tmp_path: Path):
    """What these tests are built of does what it says."""
    (tmp_path / "a.png").write_bytes(sixteen(0, 1))
    assert [part[4:8] for part in chunks(tmp_path / "a.png")[1:]] == [b"IHDR", b"IDAT", b"IEND"]
