"""Which keys the queries of a tile can see: the band of scores that the Hopper kernels fill."""

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


def count_key_tiles(band: Band, geometry: Geometry, row: Any, tile: Any) -> Any:
    """How many key tiles a query tile sees, inside a kernel."""
    return tile + geometry.offset + 1 - band.first[row, tile]
