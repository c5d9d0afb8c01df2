"""KnOTS: merge LoRA experts in a basis that all of them share."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._kernels import Band, Draw, Election, Left, kernels
from omnimerge.methods._ops import equal_weights, is_matrix, significant, task_vectors
from omnimerge.methods._params import Range
from omnimerge.methods._random import Stream
from omnimerge.methods._registry import merge_method
from omnimerge.methods._statistics import Trimming, gather


@merge_method(
    "knots",
    paper="https://arxiv.org/abs/2410.19735",
    family="LoRA experts",
    needs_base=True,
    select="linear",
    low_rank="columns",
)
def knots(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    inner: Literal["ties", "dare_ties"] = "ties",
    density: Annotated[float, Range(0.0, 1.0)] = 0.2,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    stream: Stream | None = None,
) -> Float[Tensor, "*shape"]:
    """Align the task vectors by one SVD, then merge their parts of it by TIES.

    [τ_1 … τ_T] = U S [V_1ᵀ … V_Tᵀ], the task vectors side by side;  P_t = S V_tᵀ;
    τ = U · TIES(P_1 … P_T);  θ = θ_base + λ τ

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each.
        inner: `ties` keeps the largest entries of the P_t; `dare_ties` drops them at random and
            rescales; both elect signs and average what agrees.
        density: share of entries of each P_t that is kept; the authors keep 20 % to 100 % with
            `ties` and 20 % to 90 % with `dare_ties`.
        scale: the factor λ; the authors take 0.4 to 0.7.
        stream: to draw from, of (seed, tensor name, position); provided by the caller.

    Returns:
        The merged tensor: float32. Tensors that are no matrices get θ_base + λ · mean_t τ_t.

    Raises:
        MethodError: if there is no base.

    Reference:
        Stoica et al. "Model Merging with SVD to Tie the Knots." ICLR 2025. §4, KnOTS-TIES and
        KnOTS-DARE-TIES.

    Differences from the authors' code:
        TIES' threshold is that of each matrix, where the code takes one over all matrices of a
        model. Singular values that are zero up to float32's rounding are left out, where the code
        leaves out those below 1e-5. The signs of singular vectors, which are arbitrary, are set
        so that the sum of each row of the P_t is not negative; it matters only for entries that
        cancel exactly. Deltas include α / r, which the code leaves out (its configs have 1).
    """
    if base is None:
        raise MethodError("knots works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    # U and S from the Gram matrix of the task vectors side by side, the smaller one in practice.
    gram = tau.new_zeros(base.shape[0], base.shape[0], dtype=torch.float64)
    for part in tau:
        gram += part.double() @ part.double().T
    values, vectors = torch.linalg.eigh(gram)
    s, u = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    # The rank that float32 task vectors can show, not the one of float64 arithmetic.
    used = significant(s.float(), (base.shape[0], len(tau) * base.shape[1]))
    parts = u[:, used].T.float() @ torch.cat(list(tau), dim=1)
    signs = torch.where(parts.sum(dim=1) < 0, -1.0, 1.0)
    parts = (parts * signs[:, None]).view(-1, len(tau), tau.shape[2])
    merged = _ties(parts.transpose(0, 1).contiguous(), weights, inner, density, stream)
    changed: Tensor = (u[:, used] * signs).float() @ merged
    return base.float() + scale * changed


def _ties(
    parts: Tensor,
    weights: Sequence[float] | None,
    inner: str,
    density: float,
    stream: Stream | None,
) -> Tensor:
    """Sparsify the parts, (models, rank, n), elect signs, and average what agrees."""
    models, shares = list(parts), equal_weights(weights, len(parts))
    if inner == "ties":
        rule = {"density": density, "threshold_scope": "exact", "weights": weights}
        trimming = Trimming(len(parts), rule)
        gather(trimming, lambda: [(models, torch.zeros_like(parts[0]))])
        left: Left = Band(trimming.thresholds[0])
        election = Election(mean=True, majority=trimming.majority)
    else:
        left, election = Draw(stream or Stream.of(0, ""), density), Election(mean=True)
    return kernels(parts).merge(models, None, shares, left, election)
