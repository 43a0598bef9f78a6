"""Classification by an encoder: one class of every document, or of every pair of documents."""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from megalodon_jax.config import AnyEncoderConfig, TrainConfig
from megalodon_jax.encoder_model import EncoderModel
from megalodon_jax.errors import ConfigError
from megalodon_jax.evaluation.classes import summarize_classes
from megalodon_jax.evaluation.summary import Evaluation
from megalodon_jax.loss import LossOutput
from megalodon_jax.tasks.mixing import mix_images, neighbours
from megalodon_jax.typing import Array, Batch, Float32, Int32, PRNGKey

if TYPE_CHECKING:
    import numpy as np

    from megalodon_jax.data.labelled import ExampleSet, LabelledFormat
    from megalodon_jax.data.loader import Loader
    from megalodon_jax.data.tokenizer import Tokenizer


# Folded into the key of a training step for mixup and cutmix.
_MIXING = 1 << 29


class ExampleSets(NamedTuple):
    """The examples of a run: those of training, and held-out sets by name ("" for one)."""

    train: "ExampleSet"
    heldout: "Mapping[str, ExampleSet]"


class ModelNeeds(NamedTuple):
    """Requirements of the examples on the encoder.

    Attributes:
      input: the kind of `model.input`.
      size: token ids, or numbers of a token.
      num_classes: classes; 0: not known before the data is read.
    """

    input: str
    size: int
    num_classes: int = 0


class Classification(abc.ABC):
    """Cross-entropy of the class; the methods of a task are documented in `Task`.

    A kind of data defines `example_sets` and `needs`, and `read_file` for `megalodon classify`.

    Attributes:
      documents_per_example: 2 for pairs.
    """

    documents_per_example = 1
    # Mixing draws from the key of a training step.
    needs_key = True

    @abc.abstractmethod
    def example_sets(self, config: TrainConfig) -> ExampleSets:
        """The examples of a run.

        Raises:
          DataError: they cannot be read.
        """

    @abc.abstractmethod
    def needs(self, config: TrainConfig) -> ModelNeeds:
        """The model's settings that these examples require."""

    @abc.abstractmethod
    def read_file(self, path: Path, config: TrainConfig) -> "list[tuple[np.ndarray, ...]]":
        """The documents of the examples in a file without labels.

        Raises:
          DataError: it cannot be read.
        """

    def open_loaders(
        self, config: TrainConfig, tokenizer: "Tokenizer", *, rows: Sequence[int], num_shards: int
    ) -> "tuple[Loader, dict[str, Loader]]":
        """Rows of packed examples, and those of the held-out sets."""
        # Here, so that training steps and benchmarks run without the data libraries.
        from megalodon_jax.data.labelled_loader import make_labelled_loader

        del tokenizer
        self.check_model(config)
        sets, layout = self.example_sets(config), self.layout(config)
        self._check_classes(config, sets.train.classes)
        if config.examples.is_mixed:
            _check_whole_rows(config, sets.train)

        def open_set(examples: "ExampleSet", *, repeat: bool) -> "Loader":
            return make_labelled_loader(
                examples,
                layout,
                config.data,
                rows=tuple(rows),
                default_shards=num_shards,
                repeat=repeat,
            )

        heldout = {name: open_set(each, repeat=False) for name, each in sets.heldout.items()}
        return open_set(sets.train, repeat=True), heldout

    def heldout_loaders(self, config: TrainConfig) -> "dict[str, Loader]":
        """All rows of the held-out sets, for an evaluation alone."""
        from megalodon_jax.data.labelled_loader import make_labelled_loader

        self.check_model(config)
        sets, layout = self.example_sets(config), self.layout(config)
        rows = tuple(range(config.data.batch_size))
        return {
            name: make_labelled_loader(each, layout, config.data, rows=rows, repeat=False)
            for name, each in sets.heldout.items()
        }

    def class_names(self, config: TrainConfig) -> tuple[str, ...]:
        """Names of the classes; of data that is not here those of the settings, or numbers."""
        assert isinstance(config.model, AnyEncoderConfig)
        return config.examples.classes or tuple(map(str, range(config.model.num_classes)))

    def layout(self, config: TrainConfig) -> "LabelledFormat":
        """How the examples are laid in rows."""
        from megalodon_jax.data.labelled import LabelledFormat

        model, length = _encoder(config), config.data.seq_len
        needs, align = self.needs(config), model.chunk_size or 1
        longest = length if self.documents_per_example == 1 else length // 2 // align * align
        return LabelledFormat(
            max_length=min(config.examples.max_length or longest, longest),
            max_documents=self.max_documents(config),
            align=1 if align > length else align,
            value_size=0 if needs.input == "tokens" else needs.size,
        )

    def max_documents(self, config: TrainConfig) -> int:
        """Most documents of a row."""
        if config.data.packing == "pad":
            return self.documents_per_example
        count = self.documents_per_example
        return max(1, config.examples.max_documents // count) * count

    def check_model(self, config: TrainConfig) -> None:
        """Raises `ConfigError` if the model cannot take these examples."""
        model, needs = _encoder(config), self.needs(config)
        head = "pairs" if self.documents_per_example == 2 else "classes"
        if model.head != head:
            raise ConfigError(
                f"task {config.task!r} needs model.head = {head!r}, got {model.head!r}"
            )
        size = model.vocab_size if model.input == "tokens" else model.input_size
        name = "vocab_size" if model.input == "tokens" else "input_size"
        fits = size >= needs.size if needs.input == "tokens" else size == needs.size
        if model.input != needs.input or not fits:
            raise ConfigError(
                f"the examples of task {config.task!r} need model.input = {needs.input!r} and "
                f"{name} {needs.size}, got {model.input!r} and {size}"
            )
        settings = config.examples
        is_wav = config.task == "audio" and not settings.tfds_name and settings.path != "synthetic"
        if settings.normalize == "time" and not is_wav:
            raise ConfigError(
                "examples.normalize = 'time' is for folders of WAV files; use 'constant' with "
                "examples.mean and examples.std"
            )
        if model.num_classes < needs.num_classes:
            raise ConfigError(
                f"task {config.task!r} has {needs.num_classes} classes; set model.num_classes to it"
            )

    def _check_classes(self, config: TrainConfig, classes: Sequence[str]) -> None:
        if len(classes) > (known := _encoder(config).num_classes):
            raise ConfigError(
                f"the examples have {len(classes)} classes, model.num_classes is {known}; set it "
                f"to {len(classes)}"
            )

    def loss(
        self,
        model: EncoderModel,
        batch: Batch,
        *,
        config: TrainConfig,
        dropout_key: PRNGKey | None = None,
    ) -> LossOutput:
        """Cross-entropy of the classes of the examples; a key turns training's options on."""
        most, settings = self.max_documents(config), config.examples
        labels, weights = _labels(batch, most)
        tokens, mixed = batch.tokens, None
        if dropout_key is not None and settings.is_mixed:
            tokens, share = mix_images(
                tokens,
                jax.random.fold_in(dropout_key, _MIXING),
                mixup=settings.mixup,
                cutmix=settings.cutmix,
                patch_size=(settings.patch_size or 1) if model.config.input == "patches" else 1,
            )
            mixed = MixedLabels(neighbours(labels), share)
        scores = model(
            tokens,
            segment_ids=batch.segment_ids,
            max_documents=most,
            aligned=True,
            dropout_key=dropout_key if config.model.has_dropout else None,
        )
        if self.documents_per_example == 2:
            labels, weights = labels[:, 1::2], weights[:, 1::2]
        return class_loss(
            scores,
            labels,
            weights,
            batch.segment_ids,
            z_loss=config.z_loss,
            mixed=mixed,
            label_smoothing=0.0 if dropout_key is None else settings.label_smoothing,
        )

    def metric(self, sums: Sequence[LossOutput], num_bytes: int | None) -> Evaluation:
        """Loss, accuracy and the confusion matrix."""
        del num_bytes
        return summarize_classes(sums)


class MixedLabels(NamedTuple):
    """Classes of the images that were mixed into the examples, and the share of their own."""

    others: Int32[Array, "B M"]
    share: Float32[Array, ""]


def class_loss(
    scores: Float32[Array, "B M K"],
    labels: Int32[Array, "B M"],
    weights: Float32[Array, "B M"],
    segment_ids: Int32[Array, "B L"],
    *,
    z_loss: float = 0.0,
    mixed: MixedLabels | None = None,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Sums of -Σ_k t_k log softmax(scores)_k, and the confusion matrix.

    The target t is 1 at the label; with mixed images its share is there, and the rest at the other
    image's label. Smoothing by e makes it (1 - e) t + e / K.

    Args:
      scores: of the classes of M examples of every row.
      labels: their classes.
      weights: 0 where a row has fewer than M.
      segment_ids: of the tokens, to count them.
      z_loss: weight of log(Z)^2, as in `cross_entropy`.
      mixed: of mixed images; the class that counts for the accuracy is that of the larger share.
      label_smoothing: e.
    """
    # Scores of documents that a row lacks mean nothing, and may be NaN: selections leave them out.
    is_example = weights > 0
    scores = jnp.where(is_example[..., None], scores, 0.0)
    chosen = _score_of(scores, labels)
    if mixed is not None:
        chosen = mixed.share * chosen + (1.0 - mixed.share) * _score_of(scores, mixed.others)
        labels = jnp.where(mixed.share >= 0.5, labels, mixed.others)
    chosen = (1.0 - label_smoothing) * chosen + label_smoothing * jnp.mean(scores, axis=-1)
    log_z = jax.nn.logsumexp(scores, axis=-1)
    losses = log_z - chosen
    found = jnp.argmax(scores, axis=-1)
    classes = jnp.arange(scores.shape[-1])
    one_hot = (labels[..., None] == classes) * weights[..., None]
    of_found = (found[..., None] == classes).astype(jnp.float32)
    confusion = jnp.einsum("bmk,bmj->kj", one_hot, of_found, precision=jax.lax.Precision.HIGHEST)
    return LossOutput(
        loss_sum=jnp.sum(losses * weights),
        weight_sum=jnp.sum(weights),
        z_loss_sum=z_loss * jnp.sum(jnp.square(log_z) * weights),
        correct_sum=jnp.sum((found == labels) * weights),
        num_tokens=jnp.sum((segment_ids != 0).astype(jnp.float32)),
        confusion=confusion,
    )


def _check_whole_rows(config: TrainConfig, examples: "ExampleSet") -> None:
    if not len(examples):
        return
    length = len(examples.example(0).documents[0])
    if length != config.data.seq_len:
        raise ConfigError(
            f"an image has {length} tokens and data.seq_len is {config.data.seq_len}; mixup and "
            f"cutmix need rows of one image: set data.seq_len to {length}"
        )


def _score_of(scores: Float32[Array, "B M K"], labels: Int32[Array, "B M"]) -> Array:
    return jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]


def _labels(batch: Batch, max_documents: int) -> tuple[Array, Array]:
    """Class and weight of every document, (B, M); 0 where there is none."""
    numbers = jnp.arange(1, max_documents + 1)
    is_document = batch.segment_ids[..., None] == numbers
    labels = jnp.where(batch.weights > 0, batch.targets, 0)[..., None]
    return (
        jnp.sum(jnp.where(is_document, labels, 0), axis=1),
        jnp.sum(jnp.where(is_document, batch.weights[..., None], 0.0), axis=1),
    )


def _encoder(config: TrainConfig) -> AnyEncoderConfig:
    if not isinstance(config.model, AnyEncoderConfig):
        raise ConfigError(
            f"task {config.task!r} needs model.kind = 'encoder' or 'transformer_encoder', got "
            f"{config.model.kind!r}"
        )
    return config.model


def cache_directory(config: TrainConfig) -> Path | None:
    """The directory of generated examples; None: they are not kept."""
    from megalodon_jax.compilation_cache import user_cache_dir
    from megalodon_jax.config.examples import USER_CACHE

    setting = config.examples.cache
    if not setting:
        return None
    return user_cache_dir().parents[1] / "examples" if setting == USER_CACHE else Path(setting)


def heldout_part(parts: Mapping[str, Any], config: TrainConfig) -> Any:
    """The part of data with valid and test that the run holds out."""
    return parts[config.examples.heldout_split]
