"""Replica groups: the devices of a collective operation, in every notation that XLA prints."""

import math
import re
from collections.abc import Mapping
from itertools import pairwise

import numpy as np


def device_groups(text: str, sizes: Mapping[str, int]) -> np.ndarray:
    """(groups, devices of a group): positions in the mesh of the devices of each group.

    A pair of a collective-permute is a group; without any notation all devices form one group.

    Args:
      text: attributes of a collective instruction.
      sizes: the mesh's axes and their sizes.
    """
    pairs = re.search(r"source_target_pairs=\{([\d{},]*)\}", text)
    if pairs:
        return _integers(pairs[1]).reshape(-1, 2)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{", text)
    if named:
        chosen = re.match(r"[^}]*", text[named.end() :])
        return _named_groups(named[1], named[2], chosen[0] if chosen else "")
    iota = re.search(r"replica_groups=\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        return _iota(iota[2]).reshape([int(size) for size in iota[1].split(",")])
    explicit = re.search(r"replica_groups=\{(\{[\d{},]*\})\}", text)
    if explicit:
        return np.array([_integers(group) for group in explicit[1].split("},{")])
    return np.arange(math.prod(sizes.values()))[None]


def _named_groups(mesh: str, devices: str | None, chosen: str) -> np.ndarray:
    """Groups over `chosen` axes; 'a':(2)4 is the middle factor of axis a as (2, 4, rest)."""
    axes = [(name, int(size)) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)]
    spans = {name: [] for name, _ in axes}
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen):
        first = int(before or 1)
        spans[name].append((first, first * int(size or dict(axes)[name])))
    shape: list[int] = []
    taken: list[int] = []
    for name, size in axes:
        cuts = sorted({1, size}.union(*spans[name]))
        for low, high in pairwise(cuts):
            if any(first <= low and high <= last for first, last in spans[name]):
                taken.append(len(shape))
            shape.append(high // low)
    order = np.arange(math.prod(shape)) if devices is None else _device_order(devices)
    rest = [axis for axis in range(len(shape)) if axis not in taken]
    members = math.prod(shape[axis] for axis in taken)
    return order.reshape(shape).transpose(*rest, *taken).reshape(-1, members)


def _device_order(text: str) -> np.ndarray:
    return _iota(f"<={text}") if text.startswith("[") else _integers(text)


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): numbers from 0, reshaped to (4, 2), then transposed."""
    shape, _, order = text.removeprefix("<=").partition("T")
    numbers = _integers(shape)
    laid = np.arange(math.prod(numbers)).reshape(numbers)
    return (laid.transpose(_integers(order)) if order else laid).reshape(-1)


def _integers(text: str) -> np.ndarray:
    return np.array([int(number) for number in re.findall(r"\d+", text)], np.int64)


def axes_of(groups: np.ndarray, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which devices of one group differ."""
    coordinates = np.unravel_index(groups, tuple(sizes.values()))
    return tuple(
        axis
        for axis, along in zip(sizes, coordinates, strict=True)
        if (along != along[:, :1]).any()
    )
