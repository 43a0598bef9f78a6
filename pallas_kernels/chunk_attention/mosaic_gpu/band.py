"""The band: for every tile of queries the key tiles that it can see, which the kernels compute."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

TILE = 128


class Band(NamedTuple):
    """Which key tiles each query tile sees. B rows, L queries, I query tiles, J key tiles.

    Attributes:
      starts: first key of every query; past the query's own if it sees none.
      first_key_tile: of every query tile.
      first_unmasked_key_tile: of every query tile; all its queries see all keys from there up to
        the diagonal tile.
      last_query_tile: the last query tile that sees each key tile.
    """

    starts: Int32[Array, "B L"]
    first_key_tile: Int32[Array, "B I"]
    first_unmasked_key_tile: Int32[Array, "B I"]
    last_query_tile: Int32[Array, "B J"]


class AttentionGeometry(NamedTuple):
    """Static sizes of one call.

    Attributes:
      num_rows: rows B.
      heads: heads H.
      query_tiles: tiles I of queries in a row.
      key_tile_offset: key tiles before the first query's own.
      max_key_tiles: upper bound on the key tiles of one query tile.
      tiles_per_chunk: query tiles of a chunk, at most all of them.
      is_aligned: whether chunks begin with tiles, at multiples of `tiles_per_chunk`: bounds are
        then static and need no loads.
    """

    num_rows: int
    heads: int
    query_tiles: int
    key_tile_offset: int
    max_key_tiles: int
    tiles_per_chunk: int
    is_aligned: bool

    @property
    def band_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of an array that holds one number for every score in the band."""
        return (self.num_rows, self.heads, self.query_tiles, TILE, self.max_key_tiles * TILE)

    @property
    def key_tiles(self) -> int:
        """Tiles of keys in a row."""
        return self.key_tile_offset + self.query_tiles


def find_band(starts: Int32[Array, "B L"], geometry: AttentionGeometry) -> Band:
    """The band of queries whose intervals of keys begin at `starts`."""
    num_rows = starts.shape[0]
    query_tile = jnp.arange(geometry.query_tiles, dtype=jnp.int32)
    diagonal = query_tile + geometry.key_tile_offset
    own_key = jnp.arange(starts.shape[1], dtype=jnp.int32) + geometry.key_tile_offset * TILE
    has_keys = starts <= own_key
    by_tile = (num_rows, geometry.query_tiles, TILE)
    huge = jnp.iinfo(jnp.int32).max
    least = jnp.where(has_keys, starts, huge).reshape(by_tile).min(-1) // TILE
    # A tile without keys takes its diagonal tile. The maximum over earlier tiles makes bounds
    # increase along the row, as `last_query_tile` needs.
    first = lax.cummax(jnp.minimum(least, diagonal), axis=1)
    greatest = jnp.where(has_keys, starts, huge - TILE).reshape(by_tile).max(-1)
    key_tile = jnp.arange(geometry.key_tiles, dtype=jnp.int32)
    sees = first[:, :, None] <= key_tile
    last = jnp.where(sees, query_tile[:, None], -1).max(axis=1)
    return Band(starts, first, (greatest + TILE - 1) // TILE, last.astype(jnp.int32))


def first_key_tile(band: Band, geometry: AttentionGeometry, row: Any, query_tile: Any) -> Any:
    """The first key tile of a query tile, inside a kernel."""
    if geometry.is_aligned:
        return lax.div(query_tile, geometry.tiles_per_chunk) * geometry.tiles_per_chunk
    return band.first_key_tile[row, query_tile]


def last_query_tile(band: Band, geometry: AttentionGeometry, row: Any, key_tile: Any) -> Any:
    """The last query tile that sees a key tile, inside a kernel."""
    if geometry.is_aligned:
        chunk = lax.div(key_tile, geometry.tiles_per_chunk) * geometry.tiles_per_chunk
        return jnp.minimum(chunk + geometry.tiles_per_chunk, geometry.query_tiles) - 1
    return band.last_query_tile[row, key_tile]


def count_key_tiles(band: Band, geometry: AttentionGeometry, row: Any, query_tile: Any) -> Any:
    """The number of key tiles of a query tile, inside a kernel."""
    diagonal = query_tile + geometry.key_tile_offset
    return diagonal + 1 - first_key_tile(band, geometry, row, query_tile)


class TilePairs(NamedTuple):
    """The tiles of a row in pairs of equal work.

    A chunk's first tile sees the fewest key tiles and its last the most. The first and the last
    tile of a chunk form a pair, the second and the last but one, and so on: in a chunk that begins
    with a tile all pairs see equally many key tiles.

    Attributes:
      num_tiles: tiles in a row.
      tiles_per_chunk: tiles that form pairs with each other.
    """

    num_tiles: int
    tiles_per_chunk: int

    @property
    def num_chunks(self) -> int:
        """Chunks of tiles in a row."""
        return -(-self.num_tiles // self.tiles_per_chunk)

    @property
    def pairs_per_chunk(self) -> int:
        """Pairs in a chunk; with an odd number of tiles the last pair is one tile."""
        return -(-self.tiles_per_chunk // 2)

    def tile(self, chunk: Any, pair: Any, is_second: Any) -> tuple[Any, Any]:
        """One tile of a pair, and whether it exists."""
        mirrored = self.tiles_per_chunk - 1 - pair
        tile = chunk * self.tiles_per_chunk + jnp.where(is_second, mirrored, pair)
        is_valid = (tile < self.num_tiles) & jnp.logical_not(is_second & (mirrored == pair))
        return jnp.minimum(tile, self.num_tiles - 1), is_valid


class BandTile(NamedTuple):
    """Coordinates of a tile of the band.

    Attributes:
      row: row of the batch.
      head: head.
      query_tile: tile of queries.
      column: key tile, counted from the query tile's first one.
    """

    row: Any
    head: Any
    query_tile: Any
    column: Any


class BandTiles(NamedTuple):
    """All tiles of the band as a list of static length, `group_size` key tiles an element.

    Elements beyond a pair's key tiles are invalid. A query tile's last key tiles that do not fill
    a group are not in the list.
    """

    geometry: AttentionGeometry
    group_size: int

    @property
    def pairs(self) -> TilePairs:
        """The query tiles."""
        return TilePairs(self.geometry.query_tiles, self.geometry.tiles_per_chunk)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows, heads, chunks of a row, pairs of a chunk, groups of key tiles of a pair at most."""
        geometry, pairs = self.geometry, self.pairs
        if geometry.is_aligned:
            groups = (geometry.tiles_per_chunk + 1) // self.group_size
        else:
            groups = 2 * (geometry.max_key_tiles // self.group_size)
        return (geometry.num_rows, geometry.heads, pairs.num_chunks, pairs.pairs_per_chunk, groups)

    def locate(self, band: Band, index: Any) -> tuple[BandTile, Any]:
        """The first tile of an element, and whether the element is valid; inside a kernel."""
        total = math.prod(self.sizes)
        row, head, chunk, pair, group = unravel(jnp.minimum(index, total - 1), self.sizes)
        counts, tiles = [], []
        for is_second in (False, True):
            tile, is_valid = self.pairs.tile(chunk, pair, is_second)
            count = lax.div(count_key_tiles(band, self.geometry, row, tile), self.group_size)
            counts.append(jnp.where(is_valid, count, 0))
            tiles.append(tile)
        is_second = group >= counts[0]
        column = self.group_size * jnp.where(is_second, group - counts[0], group)
        is_valid = (group < counts[0] + counts[1]) & (index < total)
        return BandTile(row, head, jnp.where(is_second, tiles[1], tiles[0]), column), is_valid


def unravel(index: Any, sizes: tuple[int, ...]) -> list[Any]:
    """Indices along axes of the given sizes; the last axis changes fastest."""
    indices = []
    for size in reversed(sizes):
        indices.insert(0, lax.rem(index, size))
        index = lax.div(index, size)
    return indices
