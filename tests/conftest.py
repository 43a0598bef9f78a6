"""Settings for all tests; read before JAX starts."""

import gc
import os

# Tracing makes many objects that stay: looking for garbage less often saves a twentieth of the
# time.
gc.set_threshold(100_000, 50, 100)

# Compilation is most of the suite's time: LLVM's optimizer triples it, and small shapes run in no
# time without. What is measured at full optimization asks for it (`compiler_options`).
# Eight devices on one CPU stand for a mesh; what names no device runs on the first one.
_FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}"

# The compilers for absent devices (tests/topologies.py) come with backends that JAX would try to
# start. On a GPU run the tests with JAX_PLATFORMS=cuda.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
