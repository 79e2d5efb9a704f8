"""The classifier's attention that is trained this way."""

from __future__ import annotations

from torch import Tensor, nn

from brainalign_kernels.adversarial.perturbation import masked_attention

__all__ = ["AdditiveAttentionPooling"]


class AdditiveAttentionPooling(nn.Module):
    r"""Attention-weighted sum of hidden states.

    .. math:: s_t = w^\top \tanh(W h_t + b), \quad a = \mathrm{softmax}(s), \quad
              \sum_t a_t h_t

    `scores` and `pool` are apart, so that the scores can be perturbed in between.

    Parameters
    ----------
    hidden_size : int
        Channels C.
    attention_size : int, optional
        Rows of W; by default half of `hidden_size`.

    References
    ----------
    Bahdanau et al. (2015), Neural machine translation by jointly learning to align and translate.
    """

    def __init__(self, hidden_size: int, attention_size: int | None = None) -> None:
        super().__init__()
        size = hidden_size // 2 if attention_size is None else attention_size
        self.hidden = nn.Linear(hidden_size, size)
        self.score = nn.Linear(size, 1, bias=False)

    def scores(self, hidden_states: Tensor) -> Tensor:
        """Scores (B, T) of hidden states (B, T, C)."""
        scores: Tensor = self.score(self.hidden(hidden_states).tanh()).squeeze(-1)
        return scores

    def pool(self, scores: Tensor, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weighted sum (B, C)."""
        return (masked_attention(scores, mask)[..., None] * hidden_states).sum(dim=1)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool hidden states (B, T, C) to (B, C); mask (B, T) is True at tokens."""
        return self.pool(self.scores(hidden_states), hidden_states, mask)
