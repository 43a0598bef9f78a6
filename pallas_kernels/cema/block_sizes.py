"""Block sizes in plain JAX, and the least lengths of kernels, from measurements (README.md)."""

# Tokens of a block. Longer blocks mean more work inside blocks, and fewer states between them.
XLA_BLOCK_SIZE = 32
# Blocks merged at every level of the scan over blocks.
SCAN_FAN_IN = 8
# Calls of up to this many tokens step through the recurrence, in at most five launches on a GPU
# (three for the single token of decoding).
STEPPED_LENGTH = 16
# Shorter calls take `xla` even where there is a kernel. On a GPU the kernels are 7 to 15 launches,
# the blocks of `xla` 18 and a loop; on TPU a kernel computes at least 1,024 tokens.
SHORTEST_GPU_LENGTH = 17
SHORTEST_TPU_LENGTH = 128
