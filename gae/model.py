"""The gated autoencoder and its loss terms. Knows frames, neither audio nor files.

    factors = (U * x) (V y)                      U: n_factors filters of context x n_bins; V: of one frame
    m       = tanh(W2 tanh(W1 factors + b1) + b2)
    y_hat   = V^T (W1^T (W2^T m + b1) (U * x))

The features are means of m over a few transpositions of x and y and tempi of x (`GatedAutoencoder.mapping`).

S. Lattner, M. Grachten, G. Widmer: Learning Transposition-Invariant Interval Features from Symbolic Music and Audio,
ISMIR 2018. The convolution in time (``U * x``) and the first layer's bias shared with the decoder follow the authors'
published implementation.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

_PIECE = 1024  # contexts copied at a time


class GatedAutoencoder(nn.Module):
    """A gated autoencoder over frames, convolutional in time.

    Parameters
    ----------
    n_bins : int
        Bins a frame.
    sizes : gae.params.Model
        n_factors, n_hidden, n_maps, context, dilation, growth, input_scale, transposed, stretched.

    Attributes
    ----------
    filters_x : Parameter, shape (n_factors, context * n_bins)
        Frame after frame, the earliest first.
    filters_y : Parameter, shape (n_factors, n_bins)
    map_1, map_2 : Linear
        n_factors to n_hidden to n_maps.

    Notes
    -----
    Frame t (y) is set against `context` frames before it (x), those that lie `sizes.lags` frames back: close together just before it,
    further apart further back. The furthest of any of `sizes.readings` lies `sizes.reach` frames back. So sequences of x are `reach - 1`
    frames longer than those of y: y[i] goes with x[i + reach - lag] for each lag.
    """

    def __init__(self, n_bins, sizes):
        super().__init__()
        self.n_bins, self.sizes = n_bins, sizes
        self.filters_x = nn.Parameter(torch.randn(sizes.n_factors, sizes.context * n_bins) / math.sqrt(sizes.context * n_bins))
        self.filters_y = nn.Parameter(torch.randn(sizes.n_factors, n_bins) / math.sqrt(n_bins))
        self.map_1 = nn.Linear(sizes.n_factors, sizes.n_hidden)
        self.map_2 = nn.Linear(sizes.n_hidden, sizes.n_maps)

    @property
    def weights(self):
        """All weights by name, as NumPy arrays of float32."""
        return {name: tensor.detach().float().cpu().numpy() for name, tensor in self.state_dict().items()}

    def x_factors(self, x, lags=None):
        """Filter responses to the contexts in a sequence: x (..., n_frames + reach - 1, n_bins) to (..., n_frames, n_factors).

        `lags` are those of `sizes` unless given.
        """
        starts = torch.arange(x.shape[:-1].numel(), device=x.device).view(x.shape[:-1])[..., : 1 - self.sizes.reach or None]
        within = self.sizes.reach - torch.tensor(lags or self.sizes.lags, device=x.device)
        return self.responses(x.flatten(0, -2), starts[..., None] + within)

    def responses(self, frames, contexts):
        """Filter responses to contexts that may lie anywhere among frames.

        Parameters
        ----------
        frames : Tensor, shape (n, n_bins)
        contexts : Tensor of int, shape (..., context)
            Rows of `frames`, the earliest first.

        Returns
        -------
        Tensor, shape (..., n_factors)
        """
        kind, filters = frames.device.type, self.filters_x * self.sizes.input_scale  # fewer to scale than responses
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else filters.dtype
        responses = _Responses.apply(frames.to(dtype), contexts.flatten(0, -2), filters.to(dtype))
        return responses.view(*contexts.shape[:-1], -1)

    def y_factors(self, y):
        """Filter responses to frames (..., n_frames, n_bins): Tensor, shape (..., n_frames, n_factors)."""
        return F.linear(y, self.filters_y * self.sizes.input_scale)

    def mapping(self, x, y):
        """The features: what relates y to the frames before it, whatever the key and, within limits, the tempo.

        The mean of what `relate` makes of x and y as they are; moved by `sizes.transposed` bins down, with contexts read faster by
        `sizes.stretched`; and moved up, with contexts read as much slower. What a mapping still has of the key and of the tempo
        differs between them, and weighs less in their mean.

        Parameters
        ----------
        x : Tensor, shape (batch, n_frames + reach - 1, n_bins)
        y : Tensor, shape (batch, n_frames, n_bins)

        Returns
        -------
        Tensor, shape (batch, n_frames, n_maps)
            Values in (-1, 1).
        """
        made = [
            self.relate(self.x_factors(_transposed(x, bins), lags), self.y_factors(_transposed(y, bins)))
            for bins, lags in self.sizes.readings
        ]
        return torch.stack(made).mean(0)

    def relate(self, x_factors, y_factors):
        """The mapping of one reading from filter responses, both (batch, n_frames, n_factors)."""
        return torch.tanh(self.map_2(torch.tanh(self.map_1(x_factors * y_factors))))

    def reconstruct(self, mapping, x):
        """Apply the relation `mapping` to a context: the frame that should follow.

        Parameters
        ----------
        mapping : Tensor, shape (batch, n_frames, n_maps)
        x : Tensor, shape (batch, n_frames + reach - 1, n_bins)

        Returns
        -------
        Tensor, shape (batch, n_frames, n_bins)
            On the scale of the frames.
        """
        return self.rebuild(mapping, self.x_factors(x))

    def rebuild(self, mapping, x_factors):
        """`reconstruct` from filter responses (batch, n_frames, n_factors)."""
        hidden = mapping @ self.map_2.weight + self.map_1.bias
        return ((hidden @ self.map_1.weight) * x_factors) @ self.filters_y / self.sizes.input_scale

    @torch.no_grad()
    def set_filter_norm(self, norm):
        """Scale each filter of x and of y to the L2 norm `norm`."""
        for filters in (self.filters_x, self.filters_y):
            filters.mul_(norm / filters.norm(dim=1, keepdim=True).clamp_min(1e-12))


class _Responses(torch.autograd.Function):
    """Products of contexts, rows (n, context) of frames, with filters (n_factors, context * n_bins): (n, n_factors).

    Matrix products over copied contexts are faster than any convolution of full height. Copies are made piece by piece, so that one is
    multiplied while the processor's cache still holds some of it; where there will be a derivative they are kept for it.
    """

    @staticmethod
    def forward(ctx, frames, contexts, filters):
        responses, copies = [], []
        for rows in contexts.split(_PIECE):
            copy = frames.index_select(0, rows.flatten()).view(len(rows), -1)
            responses.append(copy @ filters.mT)
            if ctx.needs_input_grad[2]:
                copies.append(copy)
        ctx.save_for_backward(frames, contexts, filters, *copies)
        return torch.cat(responses)

    @staticmethod
    def backward(ctx, gradient):
        frames, contexts, filters, *copies = ctx.saved_tensors
        to_frames = to_filters = None
        if copies:
            # pieces are added up in single precision at least: in bf16 a sum of many would stop growing
            to_filters = torch.zeros_like(filters, dtype=torch.promote_types(filters.dtype, torch.float32))
            for copy, part in zip(copies, gradient.split(_PIECE), strict=True):
                to_filters += part.mT @ copy
            to_filters = to_filters.to(filters.dtype)
        if ctx.needs_input_grad[0]:
            parts = (gradient @ filters).view(-1, frames.shape[1])
            to_frames = torch.zeros_like(frames).index_add_(0, contexts.flatten(), parts)
        return to_frames, None, to_filters


def _transposed(frames, bins):
    """Frames (..., n_bins) moved up by some bins; what comes in is zero."""
    bins = max(-frames.shape[-1], min(bins, frames.shape[-1]))
    return F.pad(frames, (bins, -bins))


def sparsity(mapping):
    """Lee's sparsity and selectivity term of a mapping (batch, n_frames, n_maps), as the original computes it.

    The sum over maps of their mean square activation, plus the sum over frames of theirs:
    H. Lee, C. Ekanadham, A. Ng: Sparse deep belief net model for visual area V2, NIPS 2007.
    """
    squares = mapping.square()
    return squares.mean(dim=(0, 1)).sum() + squares.mean(dim=(0, 2)).sum()


def contrast(queries, keys, temperature):
    """InfoNCE: each query must find its own key among all keys by cosine, and each key its query.

    Parameters
    ----------
    queries, keys : Tensor, shape (..., n, n_maps)
        Row i of one belongs to row i of the other. Leading dimensions are groups on their own.
    temperature : float

    Returns
    -------
    Tensor, scalar
        Mean cross-entropy in nats.

    References
    ----------
    A. van den Oord, Y. Li, O. Vinyals: Representation Learning with Contrastive Predictive Coding, 2018.
    """
    kind = queries.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else queries.dtype
    return _InfoNCE.apply(*(F.normalize(side, dim=-1).to(dtype) for side in (queries, keys)), temperature)


class _InfoNCE(torch.autograd.Function):
    """`contrast` of rows of unit norm, with its derivative written out: autograd passes over the square of frames twice as often."""

    @staticmethod
    def forward(ctx, queries, keys, temperature):
        # a cosine by a temperature of 0.02 or more is in the range of exponentials: one serves rows and columns
        likeness = (queries / temperature @ keys.mT).float()
        own = likeness.diagonal(dim1=-2, dim2=-1).clone()
        likeness.exp_()
        rows, columns = likeness.sum(-1), likeness.sum(-2)
        ctx.save_for_backward(queries, keys, likeness, rows, columns)
        ctx.temperature = temperature
        return ((rows.log() + columns.log()) / 2 - own).mean()

    @staticmethod
    def backward(ctx, gradient):
        queries, keys, likeness, rows, columns = ctx.saved_tensors
        slope = (1 / rows[..., None] + 1 / columns[..., None, :]).mul_(likeness)
        slope.diagonal(dim1=-2, dim2=-1).sub_(2)
        slope, scale = slope.to(queries.dtype), gradient / (2 * rows.numel() * ctx.temperature)
        # the second is a product with slope as it lies: one with its transpose would copy it first
        return (slope @ keys) * scale, (queries.mT @ slope).mT * scale, None
