"""The compressed file: what comes back, and what happens to damaged ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsebench.errors import UserError
from sparsebench.kernels import container
from sparsebench.kernels.formats import NM, Bitmap


def entries() -> dict[str, container.Entry]:
    torch.manual_seed(0)
    weight, kept = torch.randn(70, 130).bfloat16(), torch.rand(70, 130) < 0.4
    return {
        "some.weight": Bitmap.from_dense(weight * kept, kept),
        "half.weight": NM.from_dense(torch.randn(6, 64), 2, 4, torch.tensor([1, 0, 1, 0]).bool().repeat(6, 16)),
        "nothing": Bitmap.from_dense(torch.zeros(3, 5)),
        "norm": torch.randn(7),
        "one": torch.tensor(3.0),
    }


def test_round_trip_bit_for_bit(tmp_path: Path) -> None:
    file, written = tmp_path / "x.safetensors", entries()
    assert container.write(file, written) == file.stat().st_size
    read = container.read(file)
    assert read.keys() == written.keys()
    for name, entry in written.items():
        if isinstance(entry, Tensor):
            assert torch.equal(read[name], entry)
            continue
        assert type(read[name]) is type(entry)
        for key, value in vars(entry).items():
            same = getattr(read[name], key)
            assert torch.equal(same, value) if isinstance(value, Tensor) else same == value


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
    name = dice.choice(["some.weight", "half.weight"])
    part = dice.choice(container.PARTS)
    damaged = _damaged(tensors[f"{name}.{part}"], dice, values=part == "values")
    if damaged is None:
        del tensors[f"{name}.{part}"]
    else:
        tensors[f"{name}.{part}"] = damaged
    headers = {key: container._header(entry) for key, entry in entries().items() if not isinstance(entry, Tensor)}
    checksums = {key: container._checksum(tensor) for key, tensor in tensors.items()}
    metadata = {"format": container.FORMAT, "version": container.VERSION}
    save_file(tensors, file, metadata | {"matrices": json.dumps(headers), "checksums": json.dumps(checksums)})
    with pytest.raises(UserError, match=r"damaged: (some|half)\.weight"):
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
