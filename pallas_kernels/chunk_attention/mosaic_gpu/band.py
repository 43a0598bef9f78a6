"""Which keys the queries of a tile can see: the band of scores that the Hopper kernels fill."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

TILE = 128


class Band(NamedTuple):
    """Which key tiles the query tiles see, and by which query tiles a key tile is seen.

    Attributes:
      starts: first key of every query; beyond the query's own if it sees none.
      first: first key tile of every query tile.
      whole: key tiles from this one up to the query tile's own are seen whole.
      last: last query tile that sees a key tile.
    """

    starts: Int32[Array, "B L"]
    first: Int32[Array, "B I"]
    whole: Int32[Array, "B I"]
    last: Int32[Array, "B J"]


class Geometry(NamedTuple):
    """Static sizes.

    Attributes:
      rows: B.
      heads: H.
      query_tiles: I, tiles of queries in a row.
      offset: key tiles before the first query's own.
      width: most key tiles of a query tile.
      period: tiles of a chunk; tiles that mirror each other in a run of so many share the work.
      is_regular: tile i sees exactly the key tiles of its own run of `period` tiles up to i.
    """

    rows: int
    heads: int
    query_tiles: int
    offset: int
    width: int
    period: int
    is_regular: bool

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of an array in the band."""
        return (self.rows, self.heads, self.query_tiles, TILE, self.width * TILE)

    @property
    def key_tiles(self) -> int:
        """Tiles of keys in a row."""
        return self.offset + self.query_tiles


def find_band(starts: Int32[Array, "B L"], geometry: Geometry) -> Band:
    """The band of queries whose intervals of keys start at `starts`."""
    rows = starts.shape[0]
    query_tile = jnp.arange(geometry.query_tiles, dtype=jnp.int32)
    own = query_tile + geometry.offset
    index = jnp.arange(starts.shape[1], dtype=jnp.int32) + geometry.offset * TILE
    live = starts <= index
    by_tile = (rows, geometry.query_tiles, TILE)
    least = jnp.where(live, starts, jnp.iinfo(jnp.int32).max).reshape(by_tile).min(-1) // TILE
    # A tile that sees nothing looks at its own keys; later tiles never look at earlier keys.
    first = lax.cummax(jnp.minimum(least, own), axis=1)
    most = jnp.where(live, starts, jnp.iinfo(jnp.int32).max - TILE).reshape(by_tile).max(-1)
    key_tile = jnp.arange(geometry.key_tiles, dtype=jnp.int32)
    sees = first[:, :, None] <= key_tile
    last = jnp.where(sees, query_tile[:, None], -1).max(axis=1)
    return Band(starts, first, (most + TILE - 1) // TILE, last.astype(jnp.int32))


def first_key_tile(band: Band, geometry: Geometry, row: Any, tile: Any) -> Any:
    """The first key tile of a query tile, inside a kernel."""
    if geometry.is_regular:
        return lax.div(tile, geometry.period) * geometry.period
    return band.first[row, tile]


def last_query_tile(band: Band, geometry: Geometry, row: Any, tile: Any) -> Any:
    """The last query tile that sees a key tile, inside a kernel."""
    if geometry.is_regular:
        end = lax.div(tile, geometry.period) * geometry.period + geometry.period
        return jnp.minimum(end, geometry.query_tiles) - 1
    return band.last[row, tile]


def count_key_tiles(band: Band, geometry: Geometry, row: Any, tile: Any) -> Any:
    """How many key tiles a query tile sees, inside a kernel."""
    return tile + geometry.offset + 1 - first_key_tile(band, geometry, row, tile)


class Runs(NamedTuple):
    """Tiles in runs of `period`; the first of a run and its last are one pair, and so on.

    In a chunk from its first token on, the two tiles of a pair together see as many key tiles as
    those of any other pair.
    """

    tiles: int
    period: int

    @property
    def count(self) -> int:
        """Runs in a row."""
        return -(-self.tiles // self.period)

    @property
    def pairs(self) -> int:
        """Pairs in a run."""
        return -(-self.period // 2)

    def tile(self, run: Any, pair: Any, second: Any) -> tuple[Any, Any]:
        """A tile of a pair, and whether there is such a tile."""
        mirrored = self.period - 1 - pair
        tile = run * self.period + jnp.where(second, mirrored, pair)
        is_live = (tile < self.tiles) & jnp.logical_not(second & (mirrored == pair))
        return jnp.minimum(tile, self.tiles - 1), is_live


class Spans(NamedTuple):
    """Spans of `together` key tiles that the query tiles see, as one list of fixed length.

    What remains of a query tile's key tiles after whole spans is not in it.
    """

    geometry: Geometry
    together: int

    @property
    def runs(self) -> Runs:
        """The query tiles."""
        return Runs(self.geometry.query_tiles, self.geometry.period)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows, heads, runs of a row, pairs of a run, spans that a pair can have."""
        geometry, runs = self.geometry, self.runs
        if geometry.is_regular:
            slots = (geometry.period + 1) // self.together
        else:
            slots = 2 * (geometry.width // self.together)
        return (geometry.rows, geometry.heads, runs.count, runs.pairs, slots)

    def find(self, band: Band, index: Any) -> tuple[Any, ...]:
        """(row, head, query tile, key tile from the band's first, whether there is such a span)."""
        total = math.prod(self.sizes)
        row, head, run, pair, slot = unravel(jnp.minimum(index, total - 1), self.sizes)
        counts, tiles = [], []
        for second in (False, True):
            tile, is_live = self.runs.tile(run, pair, second)
            count = lax.div(count_key_tiles(band, self.geometry, row, tile), self.together)
            counts.append(jnp.where(is_live, count, 0))
            tiles.append(tile)
        is_second = slot >= counts[0]
        column = self.together * jnp.where(is_second, slot - counts[0], slot)
        is_live = (slot < counts[0] + counts[1]) & (index < total)
        return row, head, jnp.where(is_second, tiles[1], tiles[0]), column, is_live


def unravel(index: Any, sizes: tuple[int, ...]) -> list[Any]:
    """Indices along axes of the sizes; the last changes fastest."""
    found = []
    for size in reversed(sizes):
        found.insert(0, lax.rem(index, size))
        index = lax.div(index, size)
    return found
