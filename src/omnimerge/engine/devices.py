"""Which accelerators a merge is to use, from what the user wrote; nothing else is touched."""

from __future__ import annotations

import warnings

import torch

from omnimerge.errors import RecipeError

_FORMS = "cpu, auto, cuda, cuda:N, or several: cuda:0,cuda:1"


def devices_named(text: str) -> tuple[str, ...]:
    """Find the accelerators that are asked for.

    Args:
        text: ``cpu``, ``auto`` (all CUDA GPUs, where there are any), ``cuda`` (the first one),
            ``cuda:1``, or several of these with commas between them.

    Returns:
        For example ``("cuda:0", "cuda:1")``; none for the CPU.

    Raises:
        RecipeError: if one is not there, cannot be used, or is no device that merges run on.
    """
    if text == "cpu":
        return ()
    there = _available()
    if text == "auto":
        return tuple(each for each in there if not _why_not(each))
    found = tuple("cuda:0" if each == "cuda" else each for each in text.replace(" ", "").split(","))
    for each in found:
        if not each.startswith("cuda:") or not each[5:].isdecimal():
            raise _refused(f"device: {each!r} is none that merges run on; give {_FORMS}", there)
        if each not in there:
            raise _refused(f"device: {each} is not there{_why_none(there)}", there)
        if reason := _why_not(each):
            raise _refused(f"device: {each} cannot be used ({reason})", there)
    return tuple(dict.fromkeys(found))


def check_executor(device: str, executor: str) -> None:
    """Refuse a device for the tasks of a cluster.

    Args:
        device: what the user wrote.
        executor: `local` or `ray`.

    Raises:
        RecipeError: if the executor computes on CPUs only.
    """
    if executor == "ray" and device != "cpu":
        problem = f"device: {device} goes with executor local; Ray's tasks compute on CPUs"
        raise RecipeError([f"{problem}, to the same bytes everywhere; leave one out"], "the call")


def describe_device(device: str) -> str:
    """Return what a device is, for people and for manifests.

    Args:
        device: for example ``cuda:0``.

    Returns:
        For example ``NVIDIA H200``.
    """
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return device


def _available() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of drivers that are missing or too old
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def _why_none(there: list[str]) -> str:
    if there:
        return ""
    built = torch.version.cuda is not None
    return " (torch finds no CUDA GPU)" if built else " (this torch is built without CUDA)"


def _why_not(device: str) -> str:
    try:
        torch.ones(1, device=device).add_(1).item()  # an old GPU gives memory and runs nothing
    except (RuntimeError, AssertionError) as error:
        return (str(error).strip() or repr(error)).splitlines()[0]
    return ""


def _refused(problem: str, there: list[str]) -> RecipeError:
    known = ["cpu", *(f"{each} ({describe_device(each)})" for each in there)]
    return RecipeError([f"{problem}; here: {', '.join(known)}"], "the call")
