"""Sizes of blocks, to be measured."""

# Queries are padded to this many rows in `xla`: a product with fewer does not use tensor cores.
QUERY_ROWS = 16
# Slots of one step of the loop that `xla` makes on a CPU.
CPU_SLOTS = 128
