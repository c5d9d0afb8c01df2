"""What each of mergekit's methods computes, said in the keywords of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["number", "integer", "truth"]


@dataclass(frozen=True)
class Setting:
    """A parameter of a mergekit method.

    Attributes:
        kind: what its values are.
        default: its default; None where there is none and `required` says what that means.
        required: whether mergekit refuses to go on without it.
    """

    kind: Kind
    default: Any = None
    required: bool = False

    @property
    def fallback(self) -> Any:
        """The default; where a value is required, one to look for further problems with."""
        return 1.0 if self.required else self.default

    def read(self, value: Any) -> Any:
        """Return a value as mergekit understands it.

        Args:
            value: from the YAML file, where 1e-5 is a text.

        Returns:
            The number or truth value.

        Raises:
            ValueError: if it is none.
        """
        if self.kind == "truth":
            if value not in (True, False):
                raise ValueError("is not true or false")
            return bool(value)
        number = _number(value)
        if self.kind == "integer" and not number.is_integer():
            raise ValueError("is no whole number")
        return int(number) if self.kind == "integer" else number


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError("is not a number") from None


@dataclass
class Values:
    """The parameters of one tensor, and what of them has no equivalent.

    Attributes:
        shared: one value per parameter.
        each: one value per model and parameter.
        problems: what was refused so far.
    """

    shared: Mapping[str, Any]
    each: Mapping[str, Sequence[Any]]
    problems: list[str] = field(default_factory=list)

    def refuse(self, key: str, value: Any, why: str) -> None:
        """Note that a parameter has no equivalent.

        Args:
            key: its name.
            value: its value.
            why: the reason and the way out.
        """
        shown = str(value).lower() if isinstance(value, bool) else value
        self.problems.append(f"parameters.{key}: {shown}: {why}")

    def one(self, key: str) -> float:
        """Return the value that all models share, where our method takes one.

        Args:
            key: name of a per-model parameter.

        Returns:
            The value; that of the first model where they differ, which is refused.
        """
        values = list(self.each[key])
        if len(set(values)) > 1:
            self.refuse(key, values, f"one {key} for all models is possible here; give them one")
        return float(values[0]) if values else 0.0

    @property
    def weights(self) -> list[float]:
        """The weight of each model."""
        return list(self.each["weight"])

    def shares(self) -> list[float]:
        """Return the weights, divided by their sum where mergekit's `normalize` asks for it.

        Returns:
            One weight per model.
        """
        total = sum(self.weights)
        if not self.shared["normalize"] or abs(total) < 1e-8:
            return self.weights
        return [weight / total for weight in self.weights]


@dataclass(frozen=True)
class PeerMethod:
    """A method of mergekit that one of ours equals.

    Attributes:
        base: what `base_model` is to it: the `ancestor` or starting point, one more `input`, or
            something that switches to `other` maths, which we do not have.
        convert: from the parameters of a tensor to the keywords of our method of that name.
        shared: parameters that are read from global settings only.
        each: parameters with one value per model.
        notes: what stays different, for the user to know.
    """

    base: Literal["ancestor", "input", "other"]
    convert: Callable[[Values], dict[str, Any]]
    shared: Mapping[str, Setting] = field(default_factory=dict)
    each: Mapping[str, Setting] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _linear(values: Values) -> dict[str, Any]:
    normalize = values.shared["normalize"]
    if normalize and abs(sum(values.weights)) < 1e-8:
        values.refuse("weight", values.weights, "they sum to zero; set normalize: false")
    return {"weights": values.weights, "normalize": normalize}


def _nuslerp(values: Values) -> dict[str, Any]:
    if not values.shared["nuslerp_flatten"]:
        values.refuse("nuslerp_flatten", False, "here whole tensors are turned; set it to true")
    total = sum(values.weights)
    return {"weights": values.weights if abs(total) >= 1e-6 else [1.0, 1.0]}


def _multislerp(values: Values) -> dict[str, Any]:
    if not values.shared["normalize_weights"] and abs(sum(values.weights) - 1) > 1e-6:
        why = "here the weights are divided by their sum; set it to true, or let them sum to 1"
        values.refuse("normalize_weights", False, why)
    if values.shared["eps"] != _EPS:
        values.refuse("eps", values.shared["eps"], "it has no equivalent; leave it out")
    return {"weights": values.weights}


def _karcher(values: Values) -> dict[str, Any]:
    return {"iterations": values.shared["max_iter"], "tolerance": values.shared["tol"]}


def _model_stock(values: Values) -> dict[str, Any]:
    if values.shared["filter_wise"]:
        values.refuse("filter_wise", True, "here the angle is taken per tensor; set it to false")
    return {}


def _sce(values: Values) -> dict[str, Any]:
    return {"select_top": _share(values.shared["select_topk"])}


def _passthrough(values: Values) -> dict[str, Any]:
    scale = next(iter(values.each["scale"]), None)
    return {} if scale is None else {"scale": scale}


def _task_arithmetic(values: Values) -> dict[str, Any]:
    return {"weights": values.shares(), "scale": values.shared["lambda"]}


def _ties(values: Values) -> dict[str, Any]:
    density = _density_without_rescale(values)
    return {
        "weights": values.weights,
        "density": density,
        "scale": values.shared["lambda"],
        "merge": _merge(values),
    }


def _breadcrumbs(values: Values) -> dict[str, Any]:
    density, gamma = _density_without_rescale(values), values.one("gamma")
    if density < 1 < density + gamma - 1e-9:
        why = f"with density {density:g} it leaves out more than there is room for"
        values.refuse("gamma", gamma, f"{why}; give at most {1 - density:g}")
    return {
        "weights": values.weights,
        "density": density,
        "gamma": gamma if density < 1 else 0.0,  # mergekit then leaves nothing out
        "scale": values.shared["lambda"],
        "normalize": values.shared["normalize"] and abs(sum(values.weights)) >= 1e-8,
    }


def _dare_linear(values: Values) -> dict[str, Any]:
    density = _share(values.one("density"))
    return {"weights": values.shares(), "density": density, "scale": _dropped_scale(values)}


def _dare_ties(values: Values) -> dict[str, Any]:
    return {
        "weights": values.weights,
        "density": _share(values.one("density")),
        "scale": _dropped_scale(values),
        "merge": _merge(values),
    }


def _della(values: Values) -> dict[str, Any]:
    return {**_dare_ties(values), "epsilon": _epsilon(values)}


def _della_linear(values: Values) -> dict[str, Any]:
    return {**_dare_linear(values), "epsilon": _epsilon(values)}


def _epsilon(values: Values) -> float:
    """Our epsilon is the width of the range of probabilities, mergekit's half of it."""
    density, epsilon = values.one("density"), values.one("epsilon")
    if density < 1 and epsilon != 0:
        why = (
            "mergekit rescales all entries of a tensor by one factor, so that small ones shrink "
            "and large ones grow on average; here each is divided by its own probability, as in "
            "the paper, and keeps its size. For the paper's, write a recipe with "
            f"density: {density:g} and epsilon: {2 * epsilon:g}"
        )
        values.refuse("epsilon", epsilon, why)
    return 0.0


def _merge(values: Values) -> str:
    """Whether the entries that agree are averaged or, without `normalize`, added up."""
    return "mean" if values.shared["normalize"] else "sum"


def _dropped_scale(values: Values) -> float:
    """The factor on the task vector; without mergekit's `rescale`, what is kept stays as it is."""
    density, scale = _share(values.one("density")), float(values.shared["lambda"])
    return scale if values.shared["rescale"] else scale * density


def _density_without_rescale(values: Values) -> float:
    density = _share(values.one("density"))
    if values.shared["rescale"] and density < 1:
        values.refuse("rescale", True, "what is kept is not rescaled here; set it to false")
    return density


def _share(value: float) -> float:
    """More than all is all, and less than nothing nothing, as mergekit has it."""
    return min(1.0, max(0.0, float(value)))


_EPS = 1e-8
_WEIGHT = {"weight": Setting("number", required=True)}
_T = {"t": Setting("number", required=True)}
_GAMMA = {"gamma": Setting("number", 0.01)}
_EPSILON = {"epsilon": Setting("number", 0.15)}

_CANCELS = (
    "where the (weighted) changes of an entry cancel exactly, mergekit takes the positive ones; "
    "here {} decides"
)
_MAJORITY = _CANCELS.format("the sign that most entries of the tensor elect")
_NOBODY = _CANCELS.format("nobody, and the entry stays the base's")
_DRAWN = (
    "the random numbers are not mergekit's; and mergekit rescales what is kept to the task "
    "vector's L1 norm, here it is divided by the density: the same but for the noise of the draw"
)
_ZERO = (
    "where one of two tensors is all zeros, the other counts with its share t here, and with "
    "sin(t pi/2) in mergekit"
)
_TINY = (
    "mergekit takes the cosine for smaller than it is where the norms of two task vectors multiply "
    "to less than 1e-6; here it is exact"
)
_QUANTILES = (
    "some entries, about 1 % of random tensors', are decided otherwise: mergekit takes the "
    "divergence of rows in float32, which is mostly rounding where they are close, and quantiles "
    "from a random sample where a tensor has more than a million entries"
)
_SMALL_ENERGY = (
    "the weights are the paper's; mergekit takes equal ones where the mean squares of the task "
    "vectors sum to less than 1e-6, as those of most fine-tunes do"
)
_SELECTED = (
    "with select_topk below 1 mergekit selects that share of the entries in which the models "
    "differ, here it is the share of all entries: more where many are unchanged"
)


def _task_vector_method(
    convert: Callable[[Values], dict[str, Any]],
    *notes: str,
    normalize: bool = False,
    rescale: bool = False,
    extra: Mapping[str, Setting] | None = None,
) -> PeerMethod:
    shared = {
        "normalize": Setting("truth", normalize),
        "rescale": Setting("truth", rescale),
        "lambda": Setting("number", 1.0),
    }
    each = {**_WEIGHT, "density": Setting("number", 1.0), **(extra or {})}
    return PeerMethod("ancestor", convert, shared, each, notes)


METHODS: Mapping[str, PeerMethod] = {
    "linear": PeerMethod("input", _linear, {"normalize": Setting("truth", True)}, _WEIGHT),
    "slerp": PeerMethod("ancestor", lambda values: dict(values.shared), _T, notes=(_ZERO,)),
    "nuslerp": PeerMethod(
        "other",
        _nuslerp,
        {"nuslerp_flatten": Setting("truth", True)},
        _WEIGHT,
        notes=(_ZERO,),
    ),
    "multislerp": PeerMethod(
        "other",
        _multislerp,
        {"normalize_weights": Setting("truth", True), "eps": Setting("number", _EPS)},
        _WEIGHT,
    ),
    "karcher": PeerMethod(
        "input",
        _karcher,
        {"max_iter": Setting("integer", 10), "tol": Setting("number", 1e-5)},
    ),
    "model_stock": PeerMethod(
        "ancestor", _model_stock, {"filter_wise": Setting("truth", False)}, notes=(_TINY,)
    ),
    "sce": PeerMethod(
        "ancestor",
        _sce,
        {"select_topk": Setting("number", 1.0)},
        notes=(_SMALL_ENERGY, _SELECTED, _NOBODY),
    ),
    "nearswap": PeerMethod("ancestor", lambda values: dict(values.shared), _T),
    "arcee_fusion": PeerMethod("ancestor", lambda _: {}, notes=(_QUANTILES,)),
    "passthrough": PeerMethod("input", _passthrough, each={"scale": Setting("number")}),
    "task_arithmetic": _task_vector_method(_task_arithmetic),
    "ties": _task_vector_method(_ties, _MAJORITY, normalize=True),
    "breadcrumbs": _task_vector_method(_breadcrumbs, extra=_GAMMA),
    "breadcrumbs_ties": _task_vector_method(_breadcrumbs, _NOBODY, extra=_GAMMA),
    "dare_linear": _task_vector_method(_dare_linear, _DRAWN, rescale=True),
    "dare_ties": _task_vector_method(_dare_ties, _DRAWN, _NOBODY, rescale=True),
    "della": _task_vector_method(
        _della, _DRAWN, _NOBODY, normalize=True, rescale=True, extra=_EPSILON
    ),
    "della_linear": _task_vector_method(_della_linear, _DRAWN, rescale=True, extra=_EPSILON),
}
"""mergekit's methods that ours equal; the names are the same on both sides."""

WITHOUT_EFFECT = ("int8_mask",)
"""Parameters that change how mergekit computes, and no number."""

KNOWN = {
    *WITHOUT_EFFECT,
    "nuslerp_row_wise",
    *(name for peer in METHODS.values() for name in (*peer.shared, *peer.each)),
}
"""Every parameter that some method of mergekit reads and that is understood here."""
