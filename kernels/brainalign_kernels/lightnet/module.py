"""LightNet's token mixer: projections, recurrence, norm and low-rank gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.errors import ShapeError, UnsupportedError
from brainalign_kernels.lightnet.attention import State, lightnet_recurrence, running_log_sum
from brainalign_kernels.lightnet.norm import RootMeanSquareNorm
from brainalign_kernels.lightnet.reference import FLOOR
from brainalign_kernels.linear_position import LRPE, MDLRPE
from brainalign_kernels.linear_position.encoding import ACTIVATIONS

__all__ = ["Core", "LightNetAttention"]


@dataclass(frozen=True)
class Core:
    """What enters and leaves the recurrence.

    Parameters
    ----------
    q, kappa : Tensor, shape (B, H, N, D)
        Queries and weights.
    v : Tensor, shape (B, H, N, E)
        Values.
    log_decay : Tensor, shape (B, H, N, D) or (B, H, N, 1)
        Logarithm of what is kept of the state at each token.
    out : Tensor, shape (B, H, N, E)
        Output.
    state : tuple of Tensor, shapes (B, H, D, E) and (B, H, D)
        After the last token.
    """

    q: Tensor
    kappa: Tensor
    v: Tensor
    log_decay: Tensor
    out: Tensor
    state: State


class LightNetAttention(nn.Module):
    r"""LightNet's token mixer.

    .. math:: \mathrm{out} = W_o\left(\mathrm{norm}(\mathrm{LightNet}(\phi(W_q x), W_k x, W_v x))
              \odot \mathrm{gate}(U V x)\right)

    Parameters
    ----------
    dim : int
        Channels C of the input and the output; a multiple of `num_heads`.
    num_heads : int
        Heads H.
    key_dim : int, optional
        Channels of all queries (and of all keys) together; by default `dim`.
    gate_dim : int, optional
        Rank of the gate; by default the channels of one head.
    bias : bool
        Of all projections but the gate's.
    gate_bias : bool
        Of the gate's second projection.
    q_activation : str
        phi, by a name that `lrpe` knows.
    scalar_decay : bool
        One logit per head, from a projection of its own, decides the decay; the weights are
        k_activation(W_k x).
    k_activation : str
        Only with `scalar_decay`.
    input_gate : bool
        Only with `scalar_decay`: times each token's share of the running sum.
    lrpe : {"rotate", "cosine", "md"}, optional
        Position encoding of queries and weights; "md" is cosine over several axes.
    axes : int
        Only with ``lrpe="md"``.
    shared_angles : bool
        All heads share the encoding's angles.
    base : float
        Of the encoding's first angles.
    gate : str, optional
        Activation of the gate; None for no gate.
    gate_pos : {"post", "pre"}
        After or before the norm.
    norm : {"rmsnorm", "grouprmsnorm"}
        Over all channels, or over those of each head.
    norm_eps : float
        Added to the mean of squares, or to their sum (`eps_on`).
    eps_on : {"mean", "sum"}
        See `norm_eps`.
    zero_start : bool
        The log-sum starts at 0 instead of minus infinity.
    scale : float
        Of the queries.
    is_causal : bool
        Otherwise every token sees all.
    chunk_size : int
        See `lightnet_attention`.
    impl : str
        See `lightnet_attention`.

    Raises
    ------
    ShapeError
        For sizes and names that do not fit.
    UnsupportedError
        For options that exclude each other.

    References
    ----------
    Qin et al. (2024), You only scan once, sec. 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        key_dim: int | None = None,
        gate_dim: int | None = None,
        bias: bool = False,
        gate_bias: bool = False,
        q_activation: str = "silu",
        scalar_decay: bool = False,
        k_activation: str = "silu",
        input_gate: bool = False,
        lrpe: str | None = None,
        axes: int = 2,
        shared_angles: bool = False,
        base: float = 10000.0,
        gate: str | None = "silu",
        gate_pos: str = "post",
        norm: str = "rmsnorm",
        norm_eps: float = 1e-6,
        eps_on: str = "mean",
        zero_start: bool = False,
        scale: float = 1.0,
        is_causal: bool = True,
        chunk_size: int = 64,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        key_dim = dim if key_dim is None else key_dim
        if num_heads < 1 or dim % num_heads or key_dim % num_heads:
            raise ShapeError(
                f"dim and key_dim must be multiples of num_heads; got {dim}, {key_dim}, "
                f"{num_heads}."
            )
        for name in (q_activation, k_activation, gate or "none"):
            if name not in ACTIVATIONS:
                raise ShapeError(
                    f"Activations must be one of {', '.join(ACTIVATIONS)}; got {name!r}."
                )
        if gate_pos not in ("pre", "post"):
            raise ShapeError(f"gate_pos must be 'pre' or 'post'; got {gate_pos!r}.")
        if input_gate and not scalar_decay:
            raise UnsupportedError("input_gate needs scalar_decay=True: otherwise it is built in.")
        if not is_causal and scalar_decay and not input_gate:
            raise UnsupportedError(
                "Without input_gate, weights under scalar_decay are defined only by a recurrence: "
                "set is_causal=True or input_gate=True."
            )
        self.num_heads, self.scale, self.chunk_size = num_heads, scale, chunk_size
        self.scalar_decay, self.input_gate, self.zero_start = scalar_decay, input_gate, zero_start
        self.is_causal, self.impl, self.gate_pos = is_causal, impl, gate_pos
        self.q_activation = ACTIVATIONS[q_activation]
        self.k_activation = ACTIVATIONS[k_activation]
        self.gate_activation = ACTIVATIONS[gate or "none"]
        self.q_proj = nn.Linear(dim, key_dim, bias=bias)
        self.k_proj = nn.Linear(dim, key_dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.f_proj = nn.Linear(dim, num_heads, bias=bias) if scalar_decay else None
        rank = dim // num_heads if gate_dim is None else gate_dim
        self.gate = (
            nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=gate_bias))
            if gate is not None
            else None
        )
        heads, channels = 1 if shared_angles else num_heads, key_dim // num_heads
        self.lrpe: LRPE | MDLRPE | None = None
        if lrpe == "md":
            self.lrpe = MDLRPE(heads, channels, axes, base=base)
        elif lrpe is not None:
            self.lrpe = LRPE(heads, channels, kind=lrpe, base=base)
        self.norm = RootMeanSquareNorm(
            dim, groups=num_heads, kind=norm, eps=norm_eps, eps_on=eps_on
        )
        self.o_proj = nn.Linear(dim, dim, bias=bias)

    def core(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        state: State | None = None,
        offset: int = 0,
        shape: Sequence[int] | None = None,
        text_tokens: int = 0,
    ) -> Core:
        """Run up to the output of the recurrence; see `forward` for the parameters."""
        if x.ndim != 3:
            raise ShapeError(f"Expected x of shape (batch, tokens, dim); got {tuple(x.shape)}.")
        if not self.is_causal and state is not None:
            raise ShapeError("Only causal attention has a state.")
        wide = accumulation_dtype(x.dtype)
        keep = None if mask is None else mask.bool()[:, None, :, None]
        q, k, v = (self._split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = self.q_activation(q)
        logits = k if self.f_proj is None else self._split(self.f_proj(x))
        if keep is not None:
            logits = logits.masked_fill(~keep, -torch.inf)
        logits = logits.to(wide)
        first = 0.0 if self.zero_start else -torch.inf
        start = logits.new_full((*logits.shape[:2], logits.shape[3]), first)
        if state is not None:
            start = state[1][..., : logits.shape[3]].to(wide)
        if not self.is_causal:
            total = torch.cat([start[:, :, None], logits], dim=2).logsumexp(dim=2, keepdim=True)
            z, share = total.expand_as(logits), (logits - total.clamp(min=FLOOR)).exp()
        else:
            z, share = running_log_sum(logits, start, impl=self.impl)
        kappa = share
        if self.scalar_decay:
            kappa = self.k_activation(k).to(wide)
            kappa = kappa * share if self.input_gate else kappa
            if keep is not None:
                kappa = kappa.masked_fill(~keep, 0.0)
        q, kappa = (self._encode(t, offset, shape, text_tokens) for t in (q, kappa))
        if z.shape[3] not in (1, q.shape[3]):
            z = torch.cat([z, z], dim=-1)
        if not self.is_causal:
            memory = kappa.transpose(-1, -2) @ v.to(wide)
            out = (self.scale * (q.to(wide) @ memory)).to(q.dtype)
            final = (memory, z.new_zeros(memory.shape[:3]))
        else:
            made = lightnet_recurrence(
                q * self.scale,
                kappa,
                v,
                z,
                state=self._full_start(state, start, q, v),
                return_state=True,
                chunk_size=self.chunk_size,
                impl=self.impl,
            )
            assert isinstance(made, tuple)
            out, final = made
        return Core(q, kappa, v, self._log_decay(z, start), out, final)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        offset: int = 0,
        shape: Sequence[int] | None = None,
        text_tokens: int = 0,
    ) -> Tensor | tuple[Tensor, State]:
        """Mix the tokens of x.

        Parameters
        ----------
        x : Tensor, shape (B, N, C)
            Tokens.
        mask : Tensor, shape (B, N), optional
            0 or False: padding, counts for nothing.
        state : tuple of Tensor, optional
            What an earlier call returned: the sequence goes on from there.
        return_state : bool
            Return the state after the last token too.
        offset : int
            Position of the first token, for ``lrpe="rotate"`` and ``"cosine"``.
        shape : sequence of int, optional
            Of the grid, for ``lrpe="md"``.
        text_tokens : int
            Tokens before the grid, for ``lrpe="md"``.

        Returns
        -------
        out : Tensor, shape (B, N, C)
        state : tuple of Tensor
            If `return_state`.
        """
        if return_state and not self.is_causal:
            raise ShapeError("Only causal attention has a state.")
        made = self.core(
            x, mask=mask, state=state, offset=offset, shape=shape, text_tokens=text_tokens
        )
        y = made.out.transpose(1, 2).flatten(2)
        gate = None if self.gate is None else self.gate_activation(self.gate(x))
        if gate is not None and self.gate_pos == "pre":
            y = y * gate
        y = self.norm(y)
        if gate is not None and self.gate_pos == "post":
            y = y * gate
        out = self.o_proj(y)
        return (out, made.state) if return_state else out

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _encode(
        self, x: Tensor, offset: int, shape: Sequence[int] | None, text_tokens: int
    ) -> Tensor:
        if isinstance(self.lrpe, MDLRPE):
            if shape is None:
                raise ShapeError("lrpe='md' needs the shape of the grid.")
            encoded: Tensor = self.lrpe(x, shape, text_tokens=text_tokens)
            return encoded
        if self.lrpe is None:
            return x
        encoded = self.lrpe(x, offset=offset)
        return encoded

    def _full_start(self, state: State | None, start: Tensor, q: Tensor, v: Tensor) -> State:
        """State before the first token, as wide as the encoded queries."""
        if state is not None:
            return state
        shape = (*q.shape[:2], q.shape[3])
        first = 0.0 if self.zero_start else -torch.inf
        return start.new_zeros((*shape, v.shape[3])), start.new_full(shape, first)

    @staticmethod
    def _log_decay(z: Tensor, start: Tensor) -> Tensor:
        if start.shape[-1] != z.shape[-1]:
            start = torch.cat([start, start], dim=-1)
        before = torch.cat([start[:, :, None], z[:, :, :-1]], dim=2)
        return torch.where(before <= FLOOR, 0.0, before - z) if z.shape[2] else z
