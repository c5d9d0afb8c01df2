"""Storage types of tensors, by the names that the safetensors format uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omnimerge.errors import CheckpointError, suggestion

if TYPE_CHECKING:
    import torch

# safetensors name -> (bytes per element, attribute of torch, floating point)
_DTYPES: dict[str, tuple[int, str, bool]] = {
    "BOOL": (1, "bool", False),
    "U8": (1, "uint8", False),
    "I8": (1, "int8", False),
    "U16": (2, "uint16", False),
    "I16": (2, "int16", False),
    "U32": (4, "uint32", False),
    "I32": (4, "int32", False),
    "U64": (8, "uint64", False),
    "I64": (8, "int64", False),
    "F8_E4M3": (1, "float8_e4m3fn", True),
    "F8_E5M2": (1, "float8_e5m2", True),
    "F16": (2, "float16", True),
    "BF16": (2, "bfloat16", True),
    "F32": (4, "float32", True),
    "F64": (8, "float64", True),
}

# What a recipe may ask for as output dtype -> safetensors name.
OUTPUT_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def is_known(dtype: str) -> bool:
    """Return whether `dtype` is a storage type that omnimerge reads.

    Args:
        dtype: a dtype name as it stands in a safetensors header, for example ``"BF16"``.

    Returns:
        True if tensors of this type can be read.
    """
    return dtype in _DTYPES


def item_size(dtype: str) -> int:
    """Return the bytes per element of a safetensors dtype.

    Args:
        dtype: for example ``"BF16"``.

    Returns:
        Bytes per element.

    Raises:
        CheckpointError: if the type is unknown, for example a packed 4-bit one.
    """
    return _entry(dtype)[0]


def is_floating(dtype: str) -> bool:
    """Return whether a safetensors dtype is floating point, so that it can be merged.

    Args:
        dtype: for example ``"BF16"``.

    Returns:
        True for floating-point types.
    """
    return _entry(dtype)[2]


def torch_dtype(dtype: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name.

    Args:
        dtype: for example ``"BF16"``.

    Returns:
        For example ``torch.bfloat16``.
    """
    import torch

    found: torch.dtype = getattr(torch, _entry(dtype)[1])
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype.

    Args:
        dtype: for example ``torch.bfloat16``.

    Returns:
        For example ``"BF16"``.

    Raises:
        CheckpointError: if safetensors has no such type.
    """
    wanted = str(dtype).removeprefix("torch.")
    for name, (_, attribute, _) in _DTYPES.items():
        if attribute == wanted:
            return name
    raise CheckpointError(f"dtype {wanted} cannot be stored in safetensors")


def _entry(dtype: str) -> tuple[int, str, bool]:
    try:
        return _DTYPES[dtype]
    except KeyError:
        raise CheckpointError(
            f"dtype {dtype!r} is not supported{suggestion(dtype, _DTYPES)}; "
            "merge checkpoints in float32, float16, bfloat16 or float8, not in a packed format"
        ) from None
