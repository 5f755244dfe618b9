"""Matrix products, norms and distances, decompositions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy import linalg as scipy_linalg

from convert.porting.rules import rule, rules_of
from convert.porting.rules.elementwise import absolute
from convert.porting.rules.promote import cast, category, opmath, real_of, refuse, together
from convert.porting.rules.reductions import axes_of

# -- products -----------------------------------------------------------------------------------

rules_of([(n, jnp.matmul) for n in ("mm", "bmm", "matmul", "linalg_matmul", "mv", "dot")])


@rule("aten.linear.default")
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x (..., in), weight (out, in): one product, without a transposed copy."""
    y = lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 1,)), ((), ())))
    return y if bias is None else y + bias


def _plus(x: Any, product: Any, beta: Any, alpha: Any) -> Any:
    """beta x + alpha product. A beta of 0 leaves x out, NaN too."""
    product = product if alpha == 1 else product * cast(alpha, product.dtype)
    if beta == 0:
        return product
    return (x if beta == 1 else x * cast(beta, x.dtype)) + product


def _added(product: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def rule_(x: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        return _plus(x, product(a, b), beta, alpha)

    return rule_


rules_of(
    {
        "addmm": _added(jnp.matmul),
        "addmv": _added(jnp.matmul),
        "baddbmm": _added(jnp.matmul),
        "addbmm": _added(lambda a, b: jnp.einsum("bij,bjk->ik", a, b)),
        "addr": _added(jnp.outer),
    }.items()
)
rules_of([("outer", jnp.outer), ("ger", jnp.outer), ("inner", jnp.inner)])


@rule("aten.kron.default")
def kron(a: Any, b: Any) -> Any:
    a, b = together(a, b)
    if a.dtype == np.bool_:
        return jnp.kron(cast(a, np.uint8), cast(b, np.uint8)) != 0
    return jnp.kron(a, b)


@rule("aten.vdot.default")
def vdot(a: Any, b: Any) -> Any:
    return jnp.sum(jnp.conj(a) * b) if category(a.dtype) == 3 else jnp.dot(a, b)


@rule("aten.linalg_vecdot.default")
def vecdot(a: Any, b: Any, *, dim: int = -1) -> Any:
    return jnp.sum(jnp.conj(a) * b, axis=dim)


@rule("aten.einsum.default")
def einsum(equation: str, tensors: Sequence[Any], *, path: Any = None) -> Any:
    return jnp.einsum(equation.replace(" ", ""), *tensors)


@rule("aten.tensordot.default")
def tensordot(a: Any, b: Any, dims_self: Sequence[int], dims_other: Sequence[int]) -> Any:
    return jnp.tensordot(a, b, (list(dims_self), list(dims_other)))


@rule("aten.bilinear.default")
def bilinear(a: Any, b: Any, weight: Any, bias: Any = None) -> Any:
    y = jnp.einsum("...i,oij,...j->...o", a, weight, b)
    return y if bias is None else y + bias


@rule("aten.chain_matmul.default", "aten.linalg_multi_dot.default")
def multi_dot(tensors: Sequence[Any]) -> Any:
    return jnp.linalg.multi_dot(tensors) if len(tensors) > 1 else tensors[0]


@rule("aten.linalg_cross.default")
def linalg_cross(a: Any, b: Any, *, dim: int = -1) -> Any:
    a, b = jnp.broadcast_arrays(*together(a, b))
    return jnp.cross(a, b, axis=dim)


@rule("aten.cross.default")
def cross(a: Any, b: Any, dim: int | None = None) -> Any:
    return linalg_cross(a, b, dim=a.shape.index(3) if dim is None else dim)


@rule("aten.trace.default")
def trace(x: Any) -> Any:
    return jnp.trace(cast(x, np.int64) if category(x.dtype) < 2 else x)


@rule("aten._grouped_mm.default")
def grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows of a in groups that end at `offs`, each times its matrix of b (G, in, out)."""
    if a.ndim != 2 or b.ndim != 3 or offs is None or bias is not None:
        raise refuse("_grouped_mm but of rows (N, in) by matrices (G, in, out)")
    sizes = jnp.diff(offs, prepend=jnp.zeros((1,), offs.dtype))
    y = lax.ragged_dot(a, b, sizes)
    return y if out_dtype is None else cast(y, out_dtype)


# -- norms and distances ------------------------------------------------------------------------


def _vector_norm(x: Any, p: Any, axes: tuple[int, ...], keepdim: bool) -> Any:
    """The gradient at 0 is 0, as torch's is."""
    size = absolute(x)
    if p == np.inf:
        return jnp.max(size, axis=axes, keepdims=keepdim)
    if p == -np.inf:
        return jnp.min(size, axis=axes, keepdims=keepdim)
    if p == 0:
        return cast(jnp.sum(x != 0, axis=axes, keepdims=keepdim), size.dtype)
    if p == 1:
        return jnp.sum(size, axis=axes, keepdims=keepdim)
    real = category(x.dtype) < 3
    squares = x * x if real else jnp.real(x) ** 2 + jnp.imag(x) ** 2
    if p != 2:
        safe = jnp.where(squares == 0, 1, squares)
        squares = jnp.where(squares == 0, 0 if p > 0 else jnp.inf, safe ** (p / 2))
    total = jnp.sum(squares, axis=axes, keepdims=keepdim)
    zero = total == 0
    root = jnp.where(zero, 1, total) ** (1 / p) if p != 2 else jnp.sqrt(jnp.where(zero, 1, total))
    return jnp.where(zero, 0 if p > 0 else jnp.inf, root)


@rule("aten.linalg_vector_norm.default")
def vector_norm(
    x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    x = x if dtype is None else cast(x, dtype)
    wider = cast(x, opmath(x.dtype))
    found = _vector_norm(wider, ord, axes_of(dim, x.ndim), keepdim)
    return cast(found, real_of(x.dtype))


@rule("aten.norm.Scalar")
def norm_scalar(x: Any, p: Any = 2) -> Any:
    return vector_norm(x, p)


@rule("aten.norm.ScalarOpt_dtype")
def norm_dtype(x: Any, p: Any, *, dtype: Any = None) -> Any:
    return vector_norm(x, 2 if p is None else p, dtype=dtype)


@rule("aten.norm.ScalarOpt_dim", "aten.norm.ScalarOpt_dim_dtype")
def norm_dim(x: Any, p: Any, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return vector_norm(x, 2 if p is None else p, dim, keepdim, dtype=dtype)


@rule("aten.frobenius_norm.dim")
def frobenius_norm(x: Any, dim: Sequence[int], keepdim: bool = False) -> Any:
    return vector_norm(x, 2, dim, keepdim)


@rule("aten.linalg_matrix_norm.default", "aten.linalg_matrix_norm.str_ord")
def matrix_norm(
    x: Any,
    ord: Any = "fro",
    dim: Sequence[int] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Any:
    x = x if dtype is None else cast(x, dtype)
    if ord == "fro":
        return vector_norm(x, 2, dim, keepdim)
    return jnp.linalg.norm(x, ord, axis=tuple(dim), keepdims=keepdim)


@rule("aten.linalg_norm.default", "aten.linalg_norm.ord_str")
def linalg_norm(
    x: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    dims = dim if isinstance(dim, list | tuple) or dim is None else [dim]
    if ord is None or (
        isinstance(ord, int | float) and (x.ndim == 1 if dims is None else len(dims) == 1)
    ):
        return vector_norm(x, 2 if ord is None else ord, dims, keepdim, dtype=dtype)
    return matrix_norm(x, ord, (-2, -1) if dims is None else dims, keepdim, dtype=dtype)


@rule("aten.dist.default")
def dist(a: Any, b: Any, p: Any = 2) -> Any:
    a, b = together(a, b)
    return vector_norm(a - b, p)


@rule("aten.pairwise_distance.default")
def pairwise_distance(
    a: Any, b: Any, p: float = 2, eps: float = 1e-6, keepdim: bool = False
) -> Any:
    return vector_norm(a - b + eps, p, [-1], keepdim)


@rule("aten.cdist.default", "aten._cdist_forward.default", "aten._euclidean_dist.default")
def cdist(a: Any, b: Any, p: float = 2, compute_mode: int | None = None) -> Any:
    return vector_norm(a[..., :, None, :] - b[..., None, :, :], p, [-1])


@rule("aten.pdist.default", "aten._pdist_forward.default")
def pdist(x: Any, p: float = 2) -> Any:
    rows, columns = np.triu_indices(x.shape[0], 1)
    return vector_norm(x[rows] - x[columns], p, [-1])


@rule("aten.cosine_similarity.default")
def cosine_similarity(a: Any, b: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    a, b = jnp.broadcast_arrays(*together(a, b))
    sizes = [jnp.maximum(vector_norm(v, 2, [dim], True), eps) for v in (a, b)]
    return jnp.sum((a / sizes[0]) * (b / sizes[1]), axis=dim if a.ndim else None)


@rule("aten.renorm.default")
def renorm(x: Any, p: Any, dim: int, maxnorm: Any) -> Any:
    axes = tuple(i for i in range(x.ndim) if i != dim % x.ndim)
    size = _vector_norm(x, p, axes, True)
    return x * jnp.where(size > maxnorm, maxnorm / (size + 1e-7), 1).astype(x.dtype)


# -- solving and decomposing --------------------------------------------------------------------


def _info(x: Any, axes: int = 2) -> Any:
    return jnp.zeros(x.shape[: x.ndim - axes], np.int32)


@rule("aten.linalg_inv_ex.default")
def inv_ex(x: Any, *, check_errors: bool = False) -> tuple[Any, Any]:
    return jnp.linalg.inv(x), _info(x)


@rule("aten.linalg_inv.default", "aten.inverse.default")
def inv(x: Any) -> Any:
    return jnp.linalg.inv(x)


@rule("aten.linalg_pinv.default", "aten.pinverse.default")
def pinv(x: Any, rcond: Any = None, hermitian: bool = False) -> Any:
    return jnp.linalg.pinv(x, hermitian=hermitian, **({} if rcond is None else {"rtol": rcond}))


def _cholesky(x: Any, upper: bool) -> Any:
    """Of one half alone, as LAPACK reads it."""
    lower = jnp.tril(x, -1)
    whole = lower + jnp.conj(jnp.swapaxes(lower, -1, -2)) + jnp.tril(jnp.triu(x))
    if upper:
        above = jnp.triu(x, 1)
        whole = above + jnp.conj(jnp.swapaxes(above, -1, -2)) + jnp.tril(jnp.triu(x))
    even = (x + jnp.conj(jnp.swapaxes(x, -1, -2))) / 2  # torch's gradient is of both halves
    whole = lax.stop_gradient(whole - even) + even
    factor = lax.linalg.cholesky(whole, symmetrize_input=False)
    return jnp.conj(jnp.swapaxes(factor, -1, -2)) if upper else factor


@rule("aten.linalg_cholesky_ex.default")
def cholesky_ex(x: Any, *, upper: bool = False, check_errors: bool = False) -> tuple[Any, Any]:
    return _cholesky(x, upper), _info(x)


@rule("aten.linalg_cholesky.default")
def linalg_cholesky(x: Any, *, upper: bool = False) -> Any:
    return _cholesky(x, upper)


@rule("aten.cholesky.default")
def cholesky(x: Any, upper: bool = False) -> Any:
    return _cholesky(x, upper)


def _is_vector(a: Any, b: Any) -> bool:
    """Whether torch takes b as vectors of the systems a."""
    return bool(b.ndim == 1 or (a.ndim - 1 == b.ndim and b.shape == a.shape[:-1]))


@rule("aten.linalg_solve.default")
def solve(a: Any, b: Any, *, left: bool = True) -> Any:
    vector = _is_vector(a, b)
    b = b[..., None] if vector else b
    if not left:
        turned = [jnp.swapaxes(v, -1, -2) for v in (a, b)]
        return jnp.swapaxes(jnp.linalg.solve(*turned), -1, -2)
    y = jnp.linalg.solve(a, b)
    return y[..., 0] if vector else y


@rule("aten.linalg_solve_triangular.default")
def solve_triangular(
    a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a = jnp.broadcast_to(a, batch + a.shape[-2:])
    b = jnp.broadcast_to(b, batch + b.shape[-2:])
    return lax.linalg.triangular_solve(
        a, b, left_side=left, lower=not upper, unit_diagonal=unitriangular
    )


@rule("aten.triangular_solve.default")
def triangular_solve(
    b: Any, a: Any, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Any, Any]:
    turned = jnp.swapaxes(a, -1, -2) if transpose else a
    x = solve_triangular(turned, b, upper=upper != transpose, unitriangular=unitriangular)
    return x, jnp.broadcast_to(a, x.shape[:-2] + a.shape[-2:])


@rule("aten.cholesky_solve.default")
def cholesky_solve(b: Any, factor: Any, upper: bool = False) -> Any:
    lower = jnp.conj(jnp.swapaxes(factor, -1, -2)) if upper else factor
    y = solve_triangular(lower, b, upper=False)
    return solve_triangular(jnp.conj(jnp.swapaxes(lower, -1, -2)), y, upper=True)


@rule("aten.linalg_det.default", "aten.det.default")
def det(x: Any) -> Any:
    return jnp.linalg.det(x)


@rule("aten.linalg_slogdet.default", "aten.slogdet.default")
def slogdet(x: Any) -> tuple[Any, Any]:
    sign, log = jnp.linalg.slogdet(x)
    return sign, log


@rule("aten.logdet.default")
def logdet(x: Any) -> Any:
    sign, log = jnp.linalg.slogdet(x)
    if category(x.dtype) == 3:
        return jnp.log(sign) + log
    return jnp.where(sign == -1, jnp.nan, log)


def _hermitian(x: Any, triangle: str) -> Any:
    """The matrix of which one triangle is given; the gradient is torch's, of all of `x`."""
    half = jnp.tril(x, -1) if triangle.upper() == "L" else jnp.triu(x, 1)
    diagonal = jnp.where(jnp.eye(x.shape[-1], dtype=bool), jnp.real(x), 0)
    whole = half + jnp.conj(half).mT + diagonal
    return lax.stop_gradient(whole) + (x - lax.stop_gradient(x))


@rule("aten.linalg_eigh.default")
def eigh(x: Any, UPLO: str = "L") -> tuple[Any, Any]:  # noqa: N803
    values, vectors = jnp.linalg.eigh(_hermitian(x, UPLO), symmetrize_input=False)
    return values, vectors


@rule("aten._linalg_eigh.default")
def eigh_(
    x: Any,
    UPLO: str = "L",  # noqa: N803
    compute_v: bool = True,
) -> tuple[Any, Any]:
    return eigh(x, UPLO)


@rule("aten.linalg_eigvalsh.default")
def eigvalsh(x: Any, UPLO: str = "L") -> Any:  # noqa: N803
    return jnp.linalg.eigvalsh(_hermitian(x, UPLO), symmetrize_input=False)


@rule("aten.linalg_qr.default")
def qr(x: Any, mode: str = "reduced") -> tuple[Any, Any]:
    if mode == "r":
        raise refuse("linalg_qr with mode='r'")
    q, r = jnp.linalg.qr(x, mode)
    return q, r


@rule("aten.linalg_svd.default")
def svd(x: Any, full_matrices: bool = True, *, driver: str | None = None) -> tuple[Any, ...]:
    return tuple(jnp.linalg.svd(x, full_matrices))


@rule("aten._linalg_svd.default")
def svd_(
    x: Any, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[Any, ...]:
    return tuple(jnp.linalg.svd(x, full_matrices))


@rule("aten.linalg_svdvals.default")
def svdvals(x: Any, *, driver: str | None = None) -> Any:
    return jnp.linalg.svd(x, compute_uv=False)


@rule("aten.linalg_matrix_power.default", "aten.matrix_power.default")
def matrix_power(x: Any, n: int) -> Any:
    return jnp.linalg.matrix_power(x, n)


@rule("aten.linalg_matrix_exp.default", "aten.matrix_exp.default")
def matrix_exp(x: Any) -> Any:
    return scipy_linalg.expm(x)
