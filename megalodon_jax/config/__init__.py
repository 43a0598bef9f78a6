"""Everything that can be set: the model's shape, the data, the optimizer, the mesh, the run.

A configuration is a tree of frozen dataclasses. It is read from a TOML file (`load_config`), can be
overridden field by field (`--optim.lr 3e-4` on the command line), and is stored resolved beside
every checkpoint. The text under a field is its `--help`.
"""

from megalodon_jax.config.data import DataConfig
from megalodon_jax.config.mesh import MeshConfig, ProcessesConfig
from megalodon_jax.config.model import DType, InitMode, ModelConfig, ModelOperation, Remat
from megalodon_jax.config.optimizer import OptimConfig
from megalodon_jax.config.parsing import config_from_dict, load_config
from megalodon_jax.config.run import TrainConfig

__all__ = [
    "DType",
    "DataConfig",
    "InitMode",
    "MeshConfig",
    "ModelConfig",
    "ModelOperation",
    "OptimConfig",
    "ProcessesConfig",
    "Remat",
    "TrainConfig",
    "config_from_dict",
    "load_config",
]
