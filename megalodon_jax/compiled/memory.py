"""A compiled program's memory on one device, as its compiler reports it."""

from typing import NamedTuple

import jax


class CompiledMemory(NamedTuple):
    """Bytes of one device's memory.

    Attributes:
      arguments: all arguments.
      outputs: results that are not stored in a donated argument.
      temporaries: everything else, as the compiler sums it.
      code: the program; TPUs keep it in the same memory.
      peak: the most in use at once; where the compiler states none, as that of a real GPU, `total`.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    peak: int

    @property
    def total(self) -> int:
        """Arguments, outputs and temporaries together: an upper bound of what runs at once."""
        return self.arguments + self.outputs + self.temporaries


def read_memory(compiled: jax.stages.Compiled) -> CompiledMemory | None:
    """The memory of a compiled function; None if the backend reports none."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    memory = CompiledMemory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )
    return memory if memory.peak else memory._replace(peak=memory.total)
