"""Nothing in a file or payload is trusted before it is checked, and only what is needed is read."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save

from lightning_hessian.records.payload import DamagedDataError, open_arrays, pack, unpack

ARRAYS = {
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b": np.array([True, False]),
    "c": np.linspace(-1, 1, 5).astype(np.float16),
    "d": np.array([2**40]),
    "e": np.zeros((0, 3)),
    "f": np.array(7.5),
}
META = {"lightning_hessian": json.dumps({"step": 3, "seconds": float("nan"), "list": [float("inf"), 1e3]})}


@pytest.fixture
def opened(tmp_path):
    """Opens a file with some content."""

    def opened(content: bytes):
        path = tmp_path / "file.safetensors"
        path.write_bytes(content)
        return open_arrays(path)

    return opened


def forged(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def ours(**entries: object) -> dict:
    return {"__metadata__": {"lightning_hessian": "{}"}, **entries}


def entry(start: object, end: object, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_what_the_library_writes_is_read(opened):
    with opened(save(ARRAYS, META)) as file:
        assert set(file) == set(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file.read(name), array)
            assert file.read(name).dtype == array.dtype
            assert file.shape(name) == array.shape


def test_what_is_packed_is_unpacked():
    values = {**ARRAYS, "transposed": ARRAYS["a"].T}
    arrays, meta = unpack(pack(values, {"step": 3}))
    assert meta == {"step": 3}
    assert set(arrays) == set(values)
    for name, array in values.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)


def test_slices_are_read(opened):
    with opened(save(ARRAYS, META)) as file:
        np.testing.assert_array_equal(file.read("a", 1), ARRAYS["a"][1])
        np.testing.assert_array_equal(file.read("a", 1, 2), ARRAYS["a"][1, 2])
        assert file.read("a", 1, 2, 3) == 23


def test_a_slice_of_a_large_file_takes_little_memory(tmp_path):
    """A row of an array of 200 MB: the peak of a process that reads it."""
    path = tmp_path / "large.safetensors"
    path.write_bytes(pack({"a": np.zeros((50, 1_000_000), np.float32)}, {}))
    code = f"""
import resource
from lightning_hessian.records.payload import open_arrays
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_arrays({str(path)!r}) as file:
    assert not file.read("a", 49).any()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(output) < 50_000  # kB


def test_reading_loads_no_torch(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(save(ARRAYS, META))
    code = f"""
import sys
from lightning_hessian.records.payload import open_arrays
with open_arrays({str(path)!r}) as file:
    file.read("a", 1)
assert not [name for name in sys.modules if name.split(".")[0] == "torch"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_that_json_does_not_know_are_none(opened):
    with opened(save(ARRAYS, META)) as file:
        assert file.meta == {"step": 3, "seconds": None, "list": [None, 1e3]}
    with opened(forged({"__metadata__": {"lightning_hessian": '{"x": 1e999}'}})) as file:
        assert file.meta == {"x": None}


@pytest.mark.parametrize("indices", [(2,), (-1,), (0, 3), (0, 0, 0, 0), (10**12,)])
def test_there_is_nothing_at_other_positions(opened, indices):
    with opened(save(ARRAYS, META)) as file, pytest.raises(DamagedDataError, match="nothing at"):
        file.read("a", *indices)


def test_other_arrays_do_not_exist(opened):
    with opened(save(ARRAYS, META)) as file:
        assert "nothing" not in file
        with pytest.raises(DamagedDataError, match="holds no nothing"):
            file.read("nothing")


def check_damaged(opened, content: bytes, match: str = "^(its? |a has)") -> None:
    """As a file and as a payload."""
    with pytest.raises(DamagedDataError, match=match), opened(content):
        pass
    with pytest.raises(DamagedDataError, match=match):
        unpack(content)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -4, -1])
def test_a_truncated_file(opened, length):
    check_damaged(opened, save(ARRAYS, META)[:length])


def test_a_file_that_is_replaced_while_it_is_read(opened, tmp_path):
    """As records are written: the reader still sees the old one, whole."""
    with opened(save(ARRAYS, META)) as file:
        (tmp_path / "new").write_bytes(b"")
        os.replace(tmp_path / "new", tmp_path / "file.safetensors")
        np.testing.assert_array_equal(file.read("a"), ARRAYS["a"])


@pytest.mark.parametrize("content", [b"", b"12345678" * 600])
def test_a_file_that_is_truncated_while_it_is_read(tmp_path, content):
    """It may also be overwritten in place. In a process of its own, which a memory map would end with SIGBUS."""
    path = tmp_path / "large.safetensors"
    path.write_bytes(pack({"a": np.zeros((50, 10_000), np.float32)}, {}))
    code = f"""
import pathlib
from lightning_hessian.records.payload import DamagedDataError, open_arrays
with open_arrays({str(path)!r}) as file:
    assert not file.read("a", 0).any()
    pathlib.Path({str(path)!r}).write_bytes({content!r})
    for indices in [(), (49,), (49, 9_999)]:
        try:
            file.read("a", *indices)
        except DamagedDataError as error:
            print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout == "a is incomplete: the file has become shorter\n" * 3


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 1 << 24, 50])
def test_a_header_longer_than_the_file(opened, length):
    check_damaged(opened, length.to_bytes(8, "little") + b"{}", "(?i)header")


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    """In a sparse file that is long enough for it."""
    path = tmp_path / "file.safetensors"
    path.write_bytes((2**31).to_bytes(8, "little") + b"{}")
    os.truncate(path, 2**32)
    with pytest.raises(DamagedDataError, match="header too large"), open_arrays(path):
        pass


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (ours(a=entry(0, 8)), b""),  # beyond the file
        (ours(a=entry(0, 8)), b"1234567"),
        (ours(a=entry(0, 8)), b"123456789"),  # more than was promised
        (ours(a=entry(2**60, 2**60 + 8)), b"12345678"),
        (ours(a=entry(0, 2**62, [2**60])), b"12345678"),
        (ours(a=entry(0, 8), b=entry(0, 8)), b"12345678"),  # overlap
        (ours(a=entry(0, 8), b=entry(4, 12)), b"123456789012"),
        (ours(a=entry(4, 12)), b"123456789012"),  # a gap
        (ours(a=entry(8, 0)), b"12345678"),
        (ours(a=entry(-8, 0)), b"12345678"),
        (ours(a=entry(0, 8, [-1, -2])), b"12345678"),
        (ours(a=entry(0, 0, [0, 2**62, 8])), b""),
        (ours(a=entry(0, 0, [0, 2**70])), b""),
        (ours(a=entry(0, 8, [3])), b"12345678"),
        (ours(a=entry(0, 4)), b"12345678"),
        (ours(a=entry(0, 8, [2.0])), b"12345678"),
        (ours(a=entry(0, 8, [True, 2])), b"12345678"),
        (ours(a=entry(0, 8, [float("nan")])), b"12345678"),
        (ours(a=entry(float("nan"), 8)), b"12345678"),
        (ours(a=entry(0, "8")), b"12345678"),
        (ours(a=entry(0, 8, [1] * 17 + [2])), b"12345678"),
        (ours(a=entry(0, 8, "2")), b"12345678"),
        (ours(a=entry(0, 8, [2], "object")), b"12345678"),
        (ours(a=entry(0, 8, [2], ["F32"])), b"12345678"),
        (ours(a=[0, 8]), b"12345678"),
        (ours(a={"dtype": "F32", "shape": [2]}), b"12345678"),
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
def test_a_forged_header(opened, header, data):
    check_damaged(opened, forged(header, data))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "C64", "U16"])
def test_a_type_that_is_none_of_ours(opened, dtype):
    size = {"F8_E4M3": 2, "C64": 16}.get(dtype, 4)
    with pytest.raises(DamagedDataError, match=dtype), opened(forged(ours(a=entry(0, size, [2], dtype)), b"." * size)):
        pass
