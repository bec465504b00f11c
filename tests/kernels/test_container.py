"""The compressed file: what comes back, and what happens to damaged ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsebench.errors import UserError
from sparsebench.kernels import container
from sparsebench.kernels.formats import NM, Bitmap, GroupQuantised


def entries() -> dict[str, container.Entry]:
    torch.manual_seed(0)
    weight, kept = torch.randn(70, 130).bfloat16(), torch.rand(70, 130) < 0.4
    return {
        "some.weight": Bitmap.from_dense(weight * kept, kept),
        "half.weight": NM.from_dense(torch.randn(6, 64), 2, 4, torch.tensor([1, 0, 1, 0]).bool().repeat(6, 16)),
        "groups.weight": GroupQuantised.from_dense(torch.randn(9, 64), torch.rand(9, 4) < 0.5),
        "nothing": Bitmap.from_dense(torch.zeros(3, 5)),
        "norm": torch.randn(7),
        "one": torch.tensor(3.0),
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    raw = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


def assert_same(read: container.Entry, written: container.Entry) -> None:
    assert type(read) is type(written)
    if isinstance(written, Tensor):
        assert same_bits(read, written)
        return
    for key, value in vars(written).items():
        found = getattr(read, key)
        assert same_bits(found, value) if isinstance(value, Tensor) else found == value, key


def test_round_trip_bit_for_bit(tmp_path: Path) -> None:
    file, written = tmp_path / "x.safetensors", entries()
    assert container.write(file, written) == file.stat().st_size
    read = container.read(file)
    assert read.keys() == written.keys()
    for name, entry in written.items():
        assert_same(read[name], entry)
    again = tmp_path / "again.safetensors"
    container.write(again, written)
    assert again.read_bytes() == file.read_bytes()
    tensors = load_file(file)
    assert sum(map(container.stored_bytes, written.values())) == sum(
        t.numel() * t.element_size() for t in tensors.values()
    )


SPECIAL = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -1e-45, 1.0])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 140),
    density=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    dtype=st.sampled_from(container.VALUES),
    pattern=st.sampled_from([None, (1, 1), (1, 2), (2, 4), (5, 8), (8, 16), (3, 32), (40, 64)]),
    group=st.sampled_from([2, 8, 16]),
    seed=st.integers(0, 99),
)
def test_any_matrix_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows, columns, density, dtype, pattern, group, seed
) -> None:
    dice = torch.Generator().manual_seed(seed)
    if pattern:
        columns -= columns % pattern[1]
    weight = SPECIAL[torch.randint(len(SPECIAL), (rows, columns), generator=dice)].to(dtype)
    kept = torch.rand(rows, columns, generator=dice) < density
    matrices: dict[str, container.Entry] = {"bitmap": Bitmap.from_dense(weight, kept)}
    if pattern:
        rank = torch.rand(rows, columns // pattern[1], pattern[1], generator=dice).argsort(-1)
        kept = (rank < pattern[0]).view(rows, columns)
        matrices["pattern"] = NM.from_dense(weight, *pattern, kept)
    wide = torch.randn(rows, columns // group * group, generator=dice)
    groups = torch.rand(rows, columns // group, generator=dice) < density
    matrices["groups"] = GroupQuantised.from_dense(wide, groups, group)
    file = tmp_path_factory.mktemp("any") / "x.safetensors"
    container.write(file, matrices)
    read = container.read(file)
    for name, matrix in matrices.items():
        assert_same(read[name], matrix)
    whole = read["pattern" if pattern else "bitmap"].dense()
    assert same_bits(whole, torch.where(kept, weight, torch.zeros((), dtype=dtype)))


def test_reading_and_writing_make_no_dense_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = entries()
    monkeypatch.setattr("sparsebench.kernels.formats._unpack", None)
    container.write(tmp_path / "x.safetensors", written)
    monkeypatch.setattr("sparsebench.kernels.formats._pack", None)
    assert_same(container.read(tmp_path / "x.safetensors")["some.weight"], written["some.weight"])


def test_layout_is_what_the_docstring_says(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    container.write(file, entries())
    stored, weight = load_file(file), entries()["some.weight"].dense()
    for row in range(70):
        bits = [int(stored["some.weight.mask"][row, c // 8]) >> c % 8 & 1 for c in range(130)]
        start, end = stored["some.weight.row_ptr"][row : row + 2].tolist()
        there = [c for c, bit in enumerate(bits) if bit]
        assert torch.equal(stored["some.weight.values"][start:end], weight[row, there])


def test_size_against_dense(tmp_path: Path) -> None:
    weight = torch.randn(512, 512).bfloat16()
    kept = torch.zeros(512, 512, dtype=torch.bool)
    kept.view(512, 64, 8)[..., :4] = True
    size = container.write(tmp_path / "x.safetensors", {"w": Bitmap.from_dense(weight * kept, kept)})
    assert size / (512 * 512 * 2) < 0.57  # half of the values and one bit per entry: 0.5625


def test_flipped_cut_and_overwritten_files(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    container.write(file, entries())
    whole, dice = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    caught = 0
    for attempt in range(300):
        data = bytearray(whole)
        if attempt % 4 == 0:
            del data[dice.randrange(len(data)) :]
        elif attempt % 4 == 1:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        elif attempt % 4 == 2:
            data[dice.randrange(header)] = dice.randrange(256)
        else:
            at = dice.randrange(header)
            data[at : at + dice.randrange(9)] = dice.randbytes(dice.randrange(9))
        file.write_bytes(data)
        try:
            container.read(file)
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith(f"{file}: ")
            caught += 1
        else:
            assert attempt % 4 or bytes(data) == whole
    assert caught > 270


@pytest.mark.parametrize("seed", range(60))
def test_consistent_checksums_over_wrong_parts(tmp_path: Path, seed: int) -> None:
    """What a checksum cannot see: parts that do not fit each other."""
    file, dice = tmp_path / "x.safetensors", random.Random(seed)
    container.write(file, entries())
    tensors = load_file(file)
    name = dice.choice(["some.weight", "half.weight", "groups.weight"])
    groups = name == "groups.weight"  # in which another offset can be as good
    part = dice.choice(container.GROUP_PARTS if groups else container.PARTS)
    damaged = _damaged(tensors[f"{name}.{part}"], dice, values=part == "values" or groups)
    if damaged is None:
        del tensors[f"{name}.{part}"]
    else:
        tensors[f"{name}.{part}"] = damaged
    save_with_checksums(tensors, file)
    with pytest.raises(UserError, match=r"damaged: (some|half|groups)\.weight"):
        container.read(file)


def save_with_checksums(tensors: dict[str, Tensor], file: Path, **changed: object) -> None:
    """As a forger would: everything fits but the parts; ``changed``: of the header of the quantised groups."""
    headers = {key: container._header(entry) for key, entry in entries().items() if not isinstance(entry, Tensor)}
    headers["groups.weight"] |= changed
    checksums = {key: container._checksum(tensor) for key, tensor in tensors.items()}
    metadata = {"format": container.FORMAT, "version": container.VERSION}
    save_file(tensors, file, metadata | {"matrices": json.dumps(headers), "checksums": json.dumps(checksums)})


@pytest.mark.parametrize(
    ("part", "at", "value", "message"),
    [
        ("row_ptr", 0, 1, "does not divide"),
        ("row_ptr", 3, 2**31 - 1, "does not divide"),
        ("row_ptr", -1, 0, "does not divide"),
        ("column", 0, -1, "outside the matrix"),
        ("column", 0, 4, "outside the matrix"),
        ("column", slice(None), 0, "does not ascend"),
    ],
)
def test_groups_that_a_kernel_would_read_foreign_memory_by(tmp_path: Path, part, at, value, message) -> None:
    file = tmp_path / "x.safetensors"
    container.write(file, entries())
    tensors = load_file(file)
    tensors[f"groups.weight.{part}"][at] = value
    save_with_checksums(tensors, file)
    with pytest.raises(UserError, match=rf"damaged: groups\.weight.*{message}"):
        container.read(file)


@pytest.mark.parametrize("group", [0, 1, 3, -2, 128, 32, "16", None, 1.5])
def test_groups_of_an_impossible_size(tmp_path: Path, group: object) -> None:
    file = tmp_path / "x.safetensors"
    container.write(file, entries())
    save_with_checksums(load_file(file), file, group=group)
    with pytest.raises(UserError, match=r"damaged: groups\.weight"):
        container.read(file)


def _damaged(tensor: Tensor, dice: random.Random, values: bool) -> Tensor | None:
    tensor, kind = tensor.clone(), dice.randrange(1 if values else 0, 5)
    if kind == 0:
        flat = tensor.view(-1)
        at = dice.randrange(flat.numel())
        flat[at] = flat[at] ^ (1 << dice.randrange(8 if tensor.dtype == torch.uint8 else 31))
        return tensor
    if kind == 1:
        return tensor[:-1].clone()
    if kind == 2:
        return tensor.to(torch.int64)
    return torch.cat([tensor, tensor[-1:]]) if kind == 3 else None


@pytest.mark.parametrize(
    "header",
    ['{"w": 3}', '{"w": {"shape": [1e9, 2]}}', '{"w": {"shape": [-1, 2]}}', '{"w": {"shape": [1, 2, 3]}}', "[]", "{",
     '{"w": {"shape": [1099511627776, 64]}}', '{"w": {"shape": [2, 64], "pattern": [4, 2]}}', "[" * 100000],
)  # fmt: skip
def test_impossible_headers(tmp_path: Path, header: str) -> None:
    file = tmp_path / "x.safetensors"
    container.write(file, {"w": Bitmap.from_dense(torch.ones(2, 64))})
    tensors = load_file(file)
    checksums = json.dumps({key: container._checksum(tensor) for key, tensor in tensors.items()})
    metadata = {"format": container.FORMAT, "version": container.VERSION}
    save_file(tensors, file, metadata | {"matrices": header, "checksums": checksums})
    with pytest.raises(UserError, match="damaged"):
        container.read(file)


def test_foreign_files(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="no such file"):
        container.read(file)
    save_file({"a": torch.ones(2)}, file)
    with pytest.raises(UserError, match=r"is not sparsebench\.bitmap64"):
        container.read(file)
    save_file({"a": torch.ones(2)}, file, {"format": container.FORMAT, "version": "2"})
    with pytest.raises(UserError, match="version 2"):
        container.read(file)
    with pytest.raises(UserError, match="cannot be written"):
        container.write(tmp_path / "nowhere" / "x.safetensors", entries())
    with pytest.raises(UserError, match=r"two tensors would be called w\.mask"):
        container.write(file, {"w": Bitmap.from_dense(torch.ones(2, 2)), "w.mask": torch.ones(1)})
