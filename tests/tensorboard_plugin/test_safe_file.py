"""Nothing that a file says is believed before it is checked."""

import io
import json

import numpy as np
import pytest
from safetensors.numpy import save

from lightning_hessian.tensorboard_plugin.refusal import DamagedFile
from lightning_hessian.tensorboard_plugin.safe_file import SafeFile

ARRAYS = {
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b": np.array([True, False]),
    "c": np.linspace(-1, 1, 5).astype(np.float16),
    "d": np.array([2**40]),
    "e": np.zeros((0, 3)),
    "f": np.array(7.5),
}
META = {"lightning_hessian": json.dumps({"step": 3, "seconds": float("nan"), "list": [float("inf"), 1e3]})}


def opened(content: bytes) -> SafeFile:
    return SafeFile(io.BytesIO(content), len(content))


def forged(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def told(**entries: object) -> dict:
    return {"__metadata__": {"lightning_hessian": "{}"}, **entries}


def entry(start: object, end: object, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_what_the_library_writes_is_read():
    file = opened(save(ARRAYS, META))
    assert set(file) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(file.read(name), array)
        assert file.read(name).dtype == array.dtype
        assert file.shape(name) == array.shape


def test_parts_are_read():
    file = opened(save(ARRAYS, META))
    np.testing.assert_array_equal(file.read("a", 1), ARRAYS["a"][1])
    np.testing.assert_array_equal(file.read("a", 1, 2), ARRAYS["a"][1, 2])
    np.testing.assert_array_equal(file.read("a", 1, rows=(1, 3)), ARRAYS["a"][1, 1:3])
    assert file.read("a", 1, 2, 3) == 23


def test_numbers_that_json_does_not_know_are_none():
    assert opened(save(ARRAYS, META)).meta == {"step": 3, "seconds": None, "list": [None, 1e3]}
    assert opened(forged({"__metadata__": {"lightning_hessian": '{"x": 1e999}'}})).meta == {"x": None}


@pytest.mark.parametrize("indices", [(2,), (-1,), (0, 3), (0, 0, 0, 0), (10**12,)])
def test_there_is_nothing_at_other_places(indices):
    with pytest.raises(DamagedFile, match="nothing at"):
        opened(save(ARRAYS, META)).read("a", *indices)


def test_other_arrays_are_not_there():
    file = opened(save(ARRAYS, META))
    assert "nothing" not in file
    with pytest.raises(DamagedFile, match="holds no nothing"):
        file.read("nothing")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -4, -1])
def test_a_truncated_file(length):
    content = save(ARRAYS, META)
    with pytest.raises(DamagedFile):
        opened(content[:length])


def test_a_file_that_shrinks_while_it_is_read():
    content = save(ARRAYS, META)
    file = SafeFile(io.BytesIO(content[:-8]), len(content))
    last = list(file)[-1]
    with pytest.raises(DamagedFile, match="too early"):
        file.read(last)


class Unread(io.BytesIO):
    """A file that tells how much was read of it at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert 0 <= size < 1 << 20
        return super().read(size)


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 1 << 24, 50])
def test_a_header_longer_than_the_file_is_not_read(length):
    content = length.to_bytes(8, "little") + b"{}"
    with pytest.raises(DamagedFile, match=f"header would have {length}"):
        SafeFile(Unread(content), len(content))


def test_a_header_longer_than_any_of_ours_is_not_read():
    content = (2**24 + 1).to_bytes(8, "little") + b"{}"
    with pytest.raises(DamagedFile, match="header would have"):
        SafeFile(Unread(content), 2**40)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (told(a=entry(0, 8)), b""),  # beyond the file
        (told(a=entry(0, 8)), b"1234567"),
        (told(a=entry(0, 8)), b"123456789"),  # more than was promised
        (told(a=entry(2**60, 2**60 + 8)), b"12345678"),
        (told(a=entry(0, 2**62, [2**60])), b"12345678"),
        (told(a=entry(0, 8), b=entry(0, 8)), b"12345678"),  # overlap
        (told(a=entry(0, 8), b=entry(4, 12)), b"123456789012"),
        (told(a=entry(4, 12)), b"123456789012"),  # a gap
        (told(a=entry(8, 0)), b"12345678"),
        (told(a=entry(-8, 0)), b"12345678"),
        (told(a=entry(0, 8, [-1, -2])), b"12345678"),
        (told(a=entry(0, 8, [3])), b"12345678"),
        (told(a=entry(0, 4)), b"12345678"),
        (told(a=entry(0, 8, [2.0])), b"12345678"),
        (told(a=entry(0, 8, [True, 2])), b"12345678"),
        (told(a=entry(0, 8, [float("nan")])), b"12345678"),
        (told(a=entry(float("nan"), 8)), b"12345678"),
        (told(a=entry(0, "8")), b"12345678"),
        (told(a=entry(0, 8, [1] * 17 + [2])), b"12345678"),
        (told(a=entry(0, 8, "2")), b"12345678"),
        (told(a=entry(0, 8, [2], "object")), b"12345678"),
        (told(a=entry(0, 8, [2], ["F32"])), b"12345678"),
        (told(a=[0, 8]), b"12345678"),
        (told(a={"dtype": "F32", "shape": [2]}), b"12345678"),
        ({"a": entry(0, 8)}, b"12345678"),  # not ours
        ({"__metadata__": {"lightning_hessian": "[1]"}}, b""),
        ({"__metadata__": {"lightning_hessian": "{"}}, b""),
        ({"__metadata__": {"lightning_hessian": 3}}, b""),
        ({"__metadata__": ["lightning_hessian"]}, b""),
        ([1], b""),
        (b"\xff\xfe", b""),
        (b"[" * 200_000, b""),
        (b'{"__metadata__": {"lightning_hessian": ' + b"1" * 5000 + b"}}", b""),
    ],
)
def test_a_forged_header(header, data):
    with pytest.raises(DamagedFile):
        opened(forged(header, data))
