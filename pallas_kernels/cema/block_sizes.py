"""Block sizes of CEMA's implementations, from measurements (README.md has the tables)."""

# Tokens of one block. Work inside a block grows with it, states between blocks shrink with it.
XLA_BLOCK_SIZE = 32
# Blocks merged at every level of the scan over blocks.
SCAN_FAN_IN = 8
# Calls of at most this many tokens step through the recurrence, at most five launches on a GPU
# (three for the one token of decoding).
STEPPED_LENGTH = 16
# Calls of fewer tokens take `xla` even where there is a kernel. On a GPU the kernels are 7 to 15
# launches, the blocks of `xla` 18 and a loop; on TPU a kernel works on at least 1,024 tokens.
SHORTEST_GPU_LENGTH = 17
SHORTEST_TPU_LENGTH = 128
