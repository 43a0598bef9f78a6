"""Block sizes of CEMA's implementations, from measurements (README.md has the tables)."""

# Tokens of one block. Work inside a block grows with it, states between blocks shrink with it.
XLA_BLOCK_SIZE = 32
# Blocks merged at every level of the scan over blocks.
SCAN_FAN_IN = 8
# Calls of at most this many tokens step through the recurrence; decoding is one token.
STEPPED_LENGTH = 4
# Calls of fewer tokens take `xla` even where there is a kernel: kernels work on whole tiles.
SHORTEST_KERNEL_LENGTH = 128
