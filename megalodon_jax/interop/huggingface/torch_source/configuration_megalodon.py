"""Configuration of MEGALODON (Ma et al. 2024, arXiv 2404.08801) for `transformers`."""

from transformers import PretrainedConfig


class MegalodonConfig(PretrainedConfig):
    """Sizes of a MEGALODON model; the names are those of `megalodon_jax.ModelConfig`.

    Args:
      vocab_size: number of token ids, the rows of the embedding.
      output_size: columns of the output matrix; None: `vocab_size`.
      num_layers: number of blocks.
      model_dim: width of the residual stream.
      z_dim: width of queries and keys, over all heads.
      value_dim: width of values and of their gate, over all heads.
      num_heads: number of attention heads.
      ffn_hidden_dim: hidden width of the feed-forward network.
      cema_ndim: complex orders of CEMA.
      chunk_size: tokens of an attention chunk.
      norm_num_groups: feature groups of TimestepNorm.
      norm_affine: learned scale (and bias) in RMSNorm and LayerNorm.
      norm_eps: added to variances.
      norm_prior_count: weight of TimestepNorm's learned prior in tokens; 0: no prior.
      rope_base: base of the rotary position embedding.
      swiglu: SwiGLU feed-forward network.
      rescale_nffn: a learned vector multiplies the feed-forward output.
      scale_emb: embeddings are multiplied by sqrt(model_dim).
      share_emb: the output matrix is the embedding.
      dropout: rate at embeddings and at both sub-layers' outputs.
      hidden_dropout: rate at hidden activations.
      attention_dropout: rate of attention.
      attention_dropout_mode: "softmax" drops weights, "dropkey" scores before the softmax.
    """

    model_type = "megalodon"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden_dim",
    }

    def __init__(
        self,
        vocab_size=32_000,
        output_size=None,
        num_layers=12,
        model_dim=1024,
        z_dim=256,
        value_dim=2048,
        num_heads=1,
        ffn_hidden_dim=2560,
        cema_ndim=16,
        chunk_size=2048,
        norm_num_groups=32,
        norm_affine=True,
        norm_eps=1e-5,
        norm_prior_count=0,
        rope_base=10_000.0,
        swiglu=False,
        rescale_nffn=False,
        scale_emb=False,
        share_emb=False,
        dropout=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_dropout_mode="softmax",
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.output_size = output_size
        self.num_layers = num_layers
        self.model_dim = model_dim
        self.z_dim = z_dim
        self.value_dim = value_dim
        self.num_heads = num_heads
        self.ffn_hidden_dim = ffn_hidden_dim
        self.cema_ndim = cema_ndim
        self.chunk_size = chunk_size
        self.norm_num_groups = norm_num_groups
        self.norm_affine = norm_affine
        self.norm_eps = norm_eps
        self.norm_prior_count = norm_prior_count
        self.rope_base = rope_base
        self.swiglu = swiglu
        self.rescale_nffn = rescale_nffn
        self.scale_emb = scale_emb
        self.share_emb = share_emb
        self.dropout = dropout
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.attention_dropout_mode = attention_dropout_mode
        self.use_cache = use_cache
        # Tying follows `share_emb` alone.
        kwargs["tie_word_embeddings"] = share_emb
        super().__init__(**kwargs)

    @property
    def num_outputs(self):
        """Columns of the output matrix."""
        return self.vocab_size if self.output_size is None else self.output_size
