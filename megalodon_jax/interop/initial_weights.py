"""The trained weights from which a run starts, and the base of a run with LoRA."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.checkpoints.base_model import BaseRecord, check_same_base
from megalodon_jax.checkpoints.compatibility import (
    CONTINUATION_FIELDS,
    DROPOUT_FIELDS,
    HEAD_FIELDS,
    check_same_model,
    has_other_head,
)
from megalodon_jax.config import AnyEncoderConfig, AnyModelConfig, TrainConfig
from megalodon_jax.errors import (
    CheckpointError,
    ConfigError,
    ConvertError,
    MismatchError,
    StoreUnreachableError,
)
from megalodon_jax.inference.sessions import fingerprint
from megalodon_jax.interop.sources import read_source
from megalodon_jax.models import abstract_model, build_model
from megalodon_jax.parallel.sharding import with_shardings
from megalodon_jax.storage.location import AnyPath


class InitialWeights(NamedTuple):
    """Trained weights for a run.

    Attributes:
      params: all parameters of the model, sharded for the run.
      path: what was read; of a run directory the checkpoint.
      model: the configuration that the weights were trained with.
      changes: fields in which the run's model differs from it: old and new values.
    """

    params: nnx.State
    path: str
    model: AnyModelConfig
    changes: dict[str, tuple[Any, Any]]

    def record(self) -> BaseRecord:
        """The record that a run with LoRA keeps; it reads every weight."""
        return BaseRecord(self.path, fingerprint(self.model, self.params))


def read_initial_weights(
    source: str | AnyPath, config: TrainConfig, mesh: Mesh | None
) -> InitialWeights:
    """Reads trained weights of any form for a run.

    `chunk_size` and `rope_base` may be others than those of the weights, because no parameter
    depends on them: training goes on with longer chunks, or with slower rotations. An encoder may
    have another head, such as a classifier after masked language modeling: `pool` and `head` are
    then fresh, from `config.seed`, and the rest is that of the weights.

    Args:
      source: as for `megalodon_jax.load`.
      config: the run.
      mesh: its devices; None: the first device.

    Raises:
      ConvertError: there is no such source, or it is damaged.
      CheckpointError: the run has no readable checkpoint.
      MismatchError: the weights are of another model; the differing fields are named.
      ConfigError: a run with LoRA is to start from the factors of another one.
    """
    read = read_source(
        source,
        reads_tokenizer=False,
        allow_unverified=config.allow_unverified,
        mesh=mesh,
        load_base=load_base,
    )
    if config.lora.rank and read.lora is not None:
        raise ConfigError(
            f"init_from {source} has LoRA factors itself; write the merged model with megalodon "
            "convert --merge, and start from that"
        )
    path = str(source) if read.run is None else str(read.run.path)
    saved = read.config.model
    allowed, params = CONTINUATION_FIELDS, nnx.state(read.model, nnx.Param)
    if isinstance(config.model, AnyEncoderConfig):
        allowed = allowed | DROPOUT_FIELDS
    is_fresh = has_other_head(saved, config.model)
    if is_fresh:
        allowed = allowed | HEAD_FIELDS
    check_same_model(saved, config.model, path, allowed=allowed)
    if is_fresh:
        params = _with_fresh_head(params, config)
    changes = {
        f"model.{name}": (getattr(saved, name), getattr(config.model, name))
        for name in sorted(allowed)
        if getattr(saved, name, None) != getattr(config.model, name, None)
    }
    params = _place(params, config, mesh)
    return InitialWeights(params, path, saved, changes)


def _with_fresh_head(params: nnx.State, config: TrainConfig) -> nnx.State:
    """The trained parameters of an encoder, with the fresh pool and head of the run."""
    fresh = nnx.state(build_model(config.model, rngs=nnx.Rngs(config.seed)), nnx.Param)
    heads = ("pool", "head")
    kept = {path: leaf for path, leaf in nnx.to_flat_state(params) if path[0] not in heads}
    new = {path: leaf for path, leaf in nnx.to_flat_state(fresh) if path[0] in heads}
    return nnx.from_flat_state({**kept, **new})


def _place(params: nnx.State, config: TrainConfig, mesh: Mesh | None) -> nnx.State:
    """The parameters in the shardings of the run."""
    if mesh is None:
        return jax.device_put(params, jax.local_devices()[0])
    abstract = with_shardings(abstract_model(config.model)[1], mesh)

    def place(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == like.sharding:
            return leaf
        # Every process has read the whole file and gives the shards of its own devices.
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, like.sharding, lambda at: value[at])

    return jax.tree.map(place, params, abstract)


def load_base(
    record: BaseRecord, config: TrainConfig, mesh: Mesh | None, *, path: str = ""
) -> nnx.State:
    """The parameters that `read_base` gives; the `checkpoints.LoadBase` of every form."""
    return read_base(record, config, mesh, path=path).params


class Base(NamedTuple):
    """The base of a run with LoRA, and the record of where it was found."""

    params: nnx.State
    record: BaseRecord


def read_base(
    record: BaseRecord, config: TrainConfig, mesh: Mesh | None, *, path: str = ""
) -> Base:
    """Reads the base that a checkpoint of LoRA factors needs.

    Args:
      record: of the checkpoint.
      config: the run that has trained the factors.
      mesh: devices over which the parameters are sharded; None: the first device.
      path: where the base is now; empty: where the run has read it.

    Raises:
      MismatchError: the weights there are other ones, or cannot be read.
    """
    path = path or record.path
    try:
        weights = read_initial_weights(path, config, mesh)
    except StoreUnreachableError:
        raise
    except (ConvertError, CheckpointError) as error:
        # Not damage of this checkpoint, so that no earlier one is tried.
        raise MismatchError(
            f"the base of the LoRA run {config.run_dir} cannot be read from {path}: {error}"
        ) from error
    found = weights.record()
    check_same_base(record, found, config.run_dir)
    return Base(weights.params, found)
