"""Settings for all tests; read before JAX starts."""

import os

# Compilation is most of the suite's time: LLVM's optimizer triples it, and small shapes run in no
# time without. What is measured at full optimization asks for it (`compiler_options`).
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

# The compilers for absent devices (tests/topologies.py) come with backends that JAX would try to
# start. On a GPU run the tests with JAX_PLATFORMS=cuda.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
