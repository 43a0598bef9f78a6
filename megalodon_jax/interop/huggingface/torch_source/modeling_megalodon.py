"""MEGALODON (Ma et al. 2024, arXiv 2404.08801) in PyTorch, as the authors released it.

The parameters have the names of the released code. The cache has a constant size: the keys and
values of the current chunk, the moments of TimestepNorm, the states of CEMA.

B batch, L length, C chunk size, D model width, Z query/key width, E value width, H heads,
N orders of CEMA, G groups of TimestepNorm.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_megalodon import MegalodonConfig

# Tokens that CEMA computes by one matrix product for each channel; states pass between such blocks.
CEMA_BLOCK = 32


class Moments(NamedTuple):
    """Mean and sum of squared deviations, in tokens, of all numbers of a group so far."""

    count: torch.Tensor  # (B,)
    mean: torch.Tensor  # (B, G)
    square_sum: torch.Tensor  # (B, G)


class LayerState(NamedTuple):
    """A block's state after some tokens; slots from the chunk's length so far on hold anything."""

    key: torch.Tensor  # (B, H, C, Z / H)
    value: torch.Tensor  # (B, H, C, E / H)
    moments: Moments
    cema: torch.Tensor  # (B, D, N) complex


class MegalodonCache:
    """The state of all blocks, of a size that does not depend on the number of tokens.

    It holds no gradients, and it cannot go back: assisted generation is refused.

    Attributes:
      seen: tokens of every row so far, left padding included.
      left_padding: of every row (B,); None: there is none.
      layers: states of the blocks, empty before the first token.
      final_norm: moments of the norm after the last block.
    """

    is_compileable = False

    def __init__(self):
        self.seen = 0
        self.left_padding: torch.Tensor | None = None
        self.layers: list[LayerState] = []
        self.final_norm: Moments | None = None

    def get_seq_length(self, layer_idx=0):
        """Tokens of every row so far."""
        del layer_idx
        return self.seen

    def get_max_cache_shape(self, layer_idx=0):
        """-1: any number of tokens."""
        del layer_idx
        return -1

    def reorder_cache(self, beam_idx):
        """Takes the rows `beam_idx`, in place."""

        def select(value):
            if value is None:
                return None
            if isinstance(value, torch.Tensor):
                return value.index_select(0, beam_idx.to(value.device))
            return type(value)(*map(select, value))

        self.layers = [select(layer) for layer in self.layers]
        self.final_norm = select(self.final_norm)
        self.left_padding = select(self.left_padding)


class Positions(NamedTuple):
    """The places of the new tokens.

    Attributes:
      first: slot of the first token in its chunk; 0 with left padding, where `index` tells.
      index: (B, L) slot of every token, counted on from the beginning of the first token's chunk,
        negative for padding; None without left padding.
      is_token: (B, L), False for padding; None without left padding.
      cos: (B or 1, L, 1, Z / 2H) of the rotary angles.
      sin: of them.
    """

    first: int
    index: torch.Tensor | None
    is_token: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor


class TimestepNorm(nn.Module):
    """Group norm by the moments of all tokens so far, merged as in Chan et al. 1979."""

    def __init__(self, config):
        super().__init__()
        self.num_groups, self.eps = config.norm_num_groups, config.norm_eps
        self.prior_count = config.norm_prior_count
        self.weight = nn.Parameter(torch.zeros(config.model_dim))
        self.bias = nn.Parameter(torch.zeros(config.model_dim))
        if self.prior_count:
            self.prior_mean = nn.Parameter(torch.zeros(self.num_groups))
            self.prior_logv = nn.Parameter(torch.zeros(self.num_groups))

    def initial_moments(self, rows, device):
        count = torch.full((rows,), float(self.prior_count), device=device)
        if self.prior_count:
            mean = self.prior_mean.float().expand(rows, -1)
            return Moments(count, mean, self.prior_count * self.prior_logv.float().exp() + 0 * mean)
        zeros = torch.zeros(rows, self.num_groups, device=device)
        return Moments(count, zeros, zeros)

    def forward(self, x, is_token=None, moments=None):
        rows, length, width = x.shape
        groups = x.float().reshape(rows, length, self.num_groups, -1)
        before = moments or self.initial_moments(rows, x.device)
        token_mean = groups.mean(-1)
        token_var = (groups - token_mean[..., None]).square().mean(-1)
        weight = groups.new_ones(rows, length) if is_token is None else is_token.float()
        count = before.count[:, None] + weight.cumsum(1)
        weight, safe_count = weight[..., None], count.clamp(min=1.0)[..., None]
        shift = ((token_mean - before.mean[:, None]) * weight).cumsum(1)
        # A row without tokens and without a prior has no mean yet: that of the first one counts.
        mean = before.mean[:, None] + shift / safe_count
        previous = torch.cat([before.mean[:, None], mean[:, :-1]], dim=1)
        between = (token_mean - previous).square() * (1.0 - 1.0 / safe_count)
        square_sum = before.square_sum[:, None] + ((token_var + between) * weight).cumsum(1)
        var = square_sum / safe_count
        y = (groups - mean[..., None]) * torch.rsqrt(var + self.eps)[..., None]
        y = y.reshape(rows, length, width) * (1.0 + self.weight.float()) + self.bias.float()
        if is_token is not None:
            y = torch.where(is_token[..., None], y, 0.0)
        after = Moments(count[:, -1], mean[:, -1], square_sum[:, -1])
        return y.to(self.weight.dtype), after


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale that is stored minus one."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.zeros(config.model_dim)) if config.norm_affine else None

    def forward(self, x):
        y = rms_normalize(x, self.eps)
        y = y if self.weight is None else y * (1.0 + self.weight.float())
        return y.to(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm with a learned scale that is stored minus one."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = self.bias = None
        if config.norm_affine:
            self.weight = nn.Parameter(torch.zeros(config.model_dim))
            self.bias = nn.Parameter(torch.zeros(config.model_dim))

    def forward(self, x):
        y = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        if self.weight is not None:
            y = y * (1.0 + self.weight.float()) + self.bias.float()
        return y


def rms_normalize(x, eps):
    """x / sqrt(mean(x^2) + eps) in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class CEMA(nn.Module):
    """Complex exponential moving average: h = q h + p x, y = Re(gamma h) / sqrt(N) + omega x.

    Parameters and state are float32: the memory of a channel hangs on the last bits of q.
    """

    def __init__(self, config):
        super().__init__()
        width, self.order = config.model_dim, config.cema_ndim
        self.alpha = nn.Parameter(torch.zeros(width, self.order, 1))
        self.delta = nn.Parameter(torch.zeros(width, self.order, 1))
        self.theta = nn.Parameter(torch.zeros(width, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(width, self.order, 2))
        self.omega = nn.Parameter(torch.zeros(width, 1))

    def coefficients(self, length):
        """p (D, N), q^0 .. q^length (D, N, length + 1) and gamma (D, N)."""
        p = torch.sigmoid(self.alpha.float())
        modulus = 1.0 - p * torch.sigmoid(self.delta.float())
        orders = torch.arange(1, self.order + 1, device=p.device)
        angle = torch.sigmoid(self.theta.float()) * (2 * math.pi / self.order) * orders[:, None]
        steps = torch.arange(length + 1, device=p.device)
        powers = torch.polar(modulus**steps, angle * steps)
        gamma = torch.view_as_complex(self.gamma.float().contiguous()) / math.sqrt(self.order)
        return p[..., 0], powers, gamma

    def forward(self, x, state=None):
        x = x.float()
        rows, length, width = x.shape
        if state is None:
            state = torch.zeros(rows, width, self.order, dtype=torch.complex64, device=x.device)
        block = min(CEMA_BLOCK, length)
        tables = self.coefficients(block)
        whole = length - length % block
        y, state = self._blocks(x[:, :whole], state, tables, block)
        if whole < length:
            tail, state = self._blocks(x[:, whole:], state, tables, length - whole)
            y = torch.cat([y, tail], dim=1)
        return y + self.omega.float()[:, 0] * x, state

    def _blocks(self, x, state, tables, block):
        p, powers, gamma = tables
        rows, length, width = x.shape
        x = x.reshape(rows, -1, block, width)
        # Inside a block: a sum over lags as a triangular matrix for each channel.
        taps = ((gamma * p)[..., None] * powers[..., :block]).real.sum(1)
        lag = torch.arange(block, device=x.device)
        lag = lag[:, None] - lag
        matrix = torch.where(lag >= 0, taps[:, lag.clamp(min=0)], 0.0)
        y = torch.einsum("dts,bjsd->bjtd", matrix, x)
        # Between blocks: what a block adds to the state, and what the state adds to a block.
        to_state = p[..., None] * powers[..., :block].flip(-1)
        added = torch.complex(
            torch.einsum("dns,bjsd->bjdn", to_state.real, x),
            torch.einsum("dns,bjsd->bjdn", to_state.imag, x),
        )
        decay, before = powers[..., block], []
        for number in range(x.shape[1]):
            before.append(state)
            state = decay * state + added[:, number]
        from_state = gamma[..., None] * powers[..., 1 : block + 1]
        states = torch.stack(before, dim=1)
        y = y + torch.einsum("dnt,bjdn->bjtd", from_state.real, states.real)
        y = y - torch.einsum("dnt,bjdn->bjtd", from_state.imag, states.imag)
        return y.reshape(rows, length, width), state


class MegaAttention(nn.Module):
    """Gated attention inside chunks; queries, keys and gate come from a moving average."""

    def __init__(self, config):
        super().__init__()
        width, z_dim, value_dim = config.model_dim, config.z_dim, config.value_dim
        self.config = config
        self.timenorm = TimestepNorm(config)
        self.cema = CEMA(config)
        self.rmsnorm = RMSNorm(config)
        self.wv = nn.Linear(width, value_dim)
        self.wz = nn.Linear(width, z_dim)
        self.wr = nn.Linear(width, value_dim)
        self.wh1 = nn.Linear(width, width)
        self.wh2 = nn.Linear(value_dim, width, bias=False)
        self.gamma = nn.Parameter(torch.zeros(2, z_dim))
        self.beta = nn.Parameter(torch.zeros(2, z_dim))

    def forward(self, x, positions, state=None):
        config = self.config
        u, moments = self.timenorm(x, positions.is_token, None if state is None else state.moments)
        m, cema_state = self.cema(u, None if state is None else state.cema)
        m = self._hidden_dropout(self.rmsnorm(m.to(u.dtype)))
        q, k = self._queries_and_keys(m, positions)
        v = F.silu(self.wv(u)).unflatten(-1, (config.num_heads, -1))
        attend = self._attend_rows if positions.index is None else self._attend_padded_rows
        attended, key, value = attend(q, k, v, positions, state)
        gated = self._hidden_dropout(F.silu(self.wr(m)) * attended.flatten(-2))
        out = F.dropout(self.wh1(m) + self.wh2(gated), config.dropout, self.training)
        return out, LayerState(key, value, moments, cema_state)

    def _hidden_dropout(self, x):
        return F.dropout(x, self.config.hidden_dropout, self.training)

    def _queries_and_keys(self, m, positions):
        config = self.config
        head_dim = config.z_dim // config.num_heads
        z = self.wz(m).float().unflatten(-1, (config.num_heads, head_dim))
        z = rms_normalize(z, config.norm_eps)
        scale = (1.0 + self.gamma.float()) / math.sqrt(head_dim)
        scale = scale.unflatten(-1, (config.num_heads, head_dim))
        offset = self.beta.float().unflatten(-1, (config.num_heads, head_dim))
        return tuple(rotate(z * scale[i] + offset[i], positions).to(m.dtype) for i in (0, 1))

    def _attend_rows(self, q, k, v, positions, state):
        """Rows without padding, (B, L, H, ...): (attended, new keys, new values)."""
        first, length, size = positions.first, q.shape[1], self.config.chunk_size
        end = first + length
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if first:
            k = torch.cat([state.key[:, :, :first], k], dim=2)
            v = torch.cat([state.value[:, :, :first], v], dim=2)
        if length == 1:
            out = self._softmax(q, k, v, causal=False)
        elif end <= size:
            out = self._softmax(F.pad(q, (0, 0, first, 0)), k, v)[:, :, first:]
        else:
            more = -end % size
            chunks = (
                to_chunks(F.pad(t, (0, 0, first if t is q else 0, more)), size) for t in (q, k, v)
            )
            out = from_chunks(self._softmax(*chunks), q.shape[0])[:, :, first:end]
        open_slots = end % size
        keys, values = (
            F.pad(t[:, :, end - open_slots :], (0, 0, 0, size - open_slots)) for t in (k, v)
        )
        return out.transpose(1, 2), keys, values

    def _attend_padded_rows(self, q, k, v, positions, state):
        """Rows at different positions: tokens are moved to their slots, and back."""
        size, index = self.config.chunk_size, positions.index
        if state is not None and index.shape[1] == 1:
            return self._attend_padded_step(q, k, v, index, state)
        rows = index.shape[0]
        row = torch.arange(rows, device=index.device)[:, None]
        num_slots = (int(index.max()) // size + 2) * size
        # Padding goes to one more slot, which is cut off.
        slot = torch.where(index < 0, num_slots, index)

        def place(t, old=None):
            slots = t.new_zeros(rows, num_slots + 1, *t.shape[2:])
            if old is not None:
                slots[:, :size] = old.transpose(1, 2)
            slots = slots.index_put((row, slot), t)
            return slots[:, :-1].transpose(1, 2)

        old = (None, None) if state is None else (state.key, state.value)
        q, k, v = place(q), place(k, old[0]), place(v, old[1])
        chunks = (to_chunks(t, size) for t in (q, k, v))
        out = from_chunks(self._softmax(*chunks), rows).transpose(1, 2)
        out = out[row, index.clamp(min=0)]
        # The chunk that the next token belongs to.
        start = (index[:, -1:] + 1) // size * size
        kept = start + torch.arange(size, device=index.device)
        return out, *(t.transpose(1, 2)[row, kept].transpose(1, 2) for t in (k, v))

    def _attend_padded_step(self, q, k, v, index, state):
        """One token of rows at different positions, in the slots (B, 1) of their chunks."""
        row, slot = torch.arange(index.shape[0], device=index.device), index[:, 0]
        key, value = state.key.clone(), state.value.clone()
        key[row, :, slot], value[row, :, slot] = k[:, 0], v[:, 0]
        # Slots after the token's hold an earlier chunk.
        mask = torch.arange(key.shape[2], device=index.device) <= index
        out = self._softmax(q.transpose(1, 2), key, value, mask=mask[:, None, None])
        return out.transpose(1, 2), key, value

    def _softmax(self, q, k, v, causal=True, mask=None):
        """softmax(q k^T) v, with 1 / sqrt(Z / H) already in queries and keys."""
        if mask is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        rate = self.config.attention_dropout if self.training else 0.0
        if rate and self.config.attention_dropout_mode == "dropkey":
            length = q.shape[-2]
            # The last query's own key is the last key; without it a query might have none.
            shift = 0 if causal else k.shape[-2] - length
            own = torch.ones(length, k.shape[-2], dtype=torch.bool, device=q.device)
            own = own.tril(shift) & own.triu(shift)
            kept = torch.rand(*q.shape[:-1], k.shape[-2], device=q.device) >= rate
            mask = (kept & torch.ones_like(own).tril(shift)) | own
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=causal, scale=1.0)


def to_chunks(t, size):
    """(B, H, J C, d) as (B J, H, C, d)."""
    return t.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)


def from_chunks(t, rows):
    """The inverse of `to_chunks`."""
    return t.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)


def rotate(x, positions):
    """Rotates the pairs (x[2j], x[2j+1]) of (B, L, H, d) by the angles of their tokens."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = positions.cos, positions.sin
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class FeedForward(nn.Module):
    """silu(n W1) W2, or (silu(n W1) * (n W3)) W2 with SwiGLU, of n = LayerNorm(y)."""

    def __init__(self, config):
        super().__init__()
        width, hidden = config.model_dim, config.ffn_hidden_dim
        self.config = config
        self.norm = LayerNorm(config)
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)
        self.fc3 = nn.Linear(width, hidden, bias=False) if config.swiglu else None
        self.alpha = nn.Parameter(torch.zeros(width)) if config.rescale_nffn else None

    def forward(self, y):
        n = self.norm(y).to(self.fc1.weight.dtype)
        hidden = F.silu(self.fc1(n))
        hidden = hidden if self.fc3 is None else hidden * self.fc3(n)
        out = self.fc2(F.dropout(hidden, self.config.hidden_dropout, self.training))
        out = F.dropout(out, self.config.dropout, self.training)
        return out if self.alpha is None else out * self.alpha


class MegalodonBlock(nn.Module):
    """y = x + attention(x); x + feed_forward(y): the second residual comes from x."""

    def __init__(self, config):
        super().__init__()
        self.mega = MegaAttention(config)
        self.nffn = FeedForward(config)

    def forward(self, x, positions, state=None):
        attended, state = self.mega(x, positions, state)
        return x + self.nffn(x + attended), state


class MegalodonOutput(nn.Module):
    """The norm after the last block, and the output matrix."""

    def __init__(self, config):
        super().__init__()
        self.final_norm = TimestepNorm(config)
        self.output = nn.Linear(config.model_dim, config.num_outputs, bias=False)


class MegalodonForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model: embedding, blocks, final norm, output matrix."""

    config_class = MegalodonConfig
    _is_stateful = True
    _no_split_modules = ["MegalodonBlock"]  # noqa: RUF012
    _tied_weights_keys = {"output.output.weight": "embed.weight"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["cema", "prior_mean", "prior_logv"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(MegalodonBlock(config) for _ in range(config.num_layers))
        self.output = MegalodonOutput(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def get_output_embeddings(self):
        return self.output.output

    def set_output_embeddings(self, new_embeddings):
        self.output.output = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(3 * module.in_features) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, CEMA):
            nn.init.normal_(module.alpha, std=0.2)
            nn.init.normal_(module.delta, std=0.2)
            width = module.theta.shape[0]
            with torch.no_grad():
                order = torch.randperm(width, device=module.theta.device) + 1
                start = torch.logit(torch.exp(-order * math.log(width) / width))
                nn.init.zeros_(module.theta).add_(start[:, None, None])
                nn.init.normal_(module.gamma)[..., 1].zero_()
            nn.init.trunc_normal_(module.omega, std=0.25, a=-1.0, b=1.0)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        return_dict=None,
        **kwargs,
    ):
        """Scores of the token that follows each token, and the cache after the last one.

        Args:
          input_ids: (B, L), any length.
          attention_mask: (B, L), or (B, tokens seen + L) with a cache; rows may be padded on the
            left or on the right.
          past_key_values: a `MegalodonCache`, which is changed in place.
          inputs_embeds: (B, L, D) instead of `input_ids`.
          labels: (B, L), -100 for tokens that do not count; they are shifted here.
          use_cache: return a cache; None: as the configuration says, outside training and without
            padding on the right, after which there is none.
          output_hidden_states: return the input of every block and the final features.
          logits_to_keep: scores of the last tokens only; 0: of all.
          return_dict: False: a tuple.
          **kwargs: of the loss.
        """
        _refuse(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        cache, use_cache = self._open_cache(attention_mask, past_key_values, use_cache, x.shape[1])
        if self.config.scale_emb:
            x = x * math.sqrt(self.config.model_dim)
        x = F.dropout(x, self.config.dropout, self.training)
        positions = self._positions(x.shape[1], x.device, cache)
        hidden_states, states = [], []
        for number, layer in enumerate(self.layers):
            hidden_states.append(x)
            x, state = layer(x, positions, cache.layers[number] if cache.layers else None)
            states.append(state)
        x, final_norm = self.output.final_norm(x, positions.is_token, cache.final_norm)
        if use_cache:
            self._update(cache, states, final_norm, x.shape[1])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output.output(x[:, kept]).float()
        loss = None
        if labels is not None:
            size = self.config.num_outputs
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        out = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    def _open_cache(self, attention_mask, past_key_values, use_cache, length):
        """The cache before the new tokens, and whether it is returned after them."""
        asked_for_cache = bool(use_cache)
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        cache = MegalodonCache() if past_key_values is None else past_key_values
        if not isinstance(cache, MegalodonCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; pass a MegalodonCache")
        ends_in_padding = _read_mask(attention_mask, length, cache)
        if ends_in_padding and (past_key_values is not None or asked_for_cache):
            raise ValueError("rows padded on the right have no cache; pad them on the left")
        return cache, use_cache and not ends_in_padding

    def _positions(self, length, device, cache):
        size = self.config.chunk_size
        token = torch.arange(length, device=device)
        first, index, is_token = 0, None, None
        if cache.left_padding is None:
            first = cache.seen % size
            slots = (first + token)[None]
        elif cache.seen:
            slots = index = (cache.seen - cache.left_padding[:, None]) % size + token
        else:
            index = token - cache.left_padding[:, None]
            is_token = index >= 0
            slots = index.clamp(min=0)
        head_dim = self.config.z_dim // self.config.num_heads
        steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        # Rounded as released: the power to float32, then its inverse.
        frequencies = 1.0 / (self.config.rope_base**steps).float()
        angles = (slots % size).float()[..., None, None] * frequencies.to(device)
        return Positions(first, index, is_token, angles.cos(), angles.sin())

    def _update(self, cache, states, final_norm, length):
        def detach(value):
            if isinstance(value, torch.Tensor):
                return value.detach()
            return type(value)(*map(detach, value))

        cache.layers = [detach(state) for state in states]
        cache.final_norm = detach(final_norm)
        cache.seen += length


def _refuse(kwargs):
    if kwargs.pop("position_ids", None) is not None:
        raise ValueError("position_ids is not supported: positions follow from the attention mask")
    if kwargs.pop("output_attentions", None):
        raise ValueError("output_attentions is not supported: attention runs in fused kernels")
    kwargs.pop("cache_position", None)


def _read_mask(mask, length, cache):
    """Sets the cache's left padding at its first tokens; returns whether rows end in padding."""
    if mask is None:
        return False
    if mask.ndim != 2 or mask.shape[1] not in (length, cache.seen + length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it must be (batch, {length}) or "
            f"(batch, {cache.seen + length})"
        )
    mask = mask[:, -length:].bool()
    if bool(mask.all()):
        return False
    if cache.seen:
        raise ValueError("padding after the first tokens is not supported with a cache")
    left = (mask.cumsum(1) == 0).sum(1)
    count = mask.sum(1)
    token = torch.arange(length, device=mask.device)
    is_filled = (token >= left[:, None]) & (token < (left + count)[:, None])
    if bool((count == 0).any()) or not bool((is_filled == mask).all()):
        raise ValueError(
            "every row of attention_mask must be one run of ones with padding on its left or right"
        )
    if bool((left > 0).any()):
        cache.left_padding = left
    return bool((left + count < length).any())
