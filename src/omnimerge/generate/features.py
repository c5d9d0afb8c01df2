"""Compute image, sound and video features once, and reuse them while only the LLM changes.

What is remembered is the result of a call: of the methods in which transformers gathers towers and
projectors (``get_image_features`` and its like), and, for models without them, of every module
that lies outside the stacks whose parameters change. No list of architectures is needed, since
nothing is taken on trust:

* while a result is computed, every tensor that an operator reads is looked at; if one of them is a
  parameter that changes, the call is not remembered;
* it is given back only to the same call, in order, of the same batch, with inputs of equal bits;
* the first time that it would be given back after the weights have changed, the call is made all
  the same, and has to give the same bits.

A call that fails any of this is made at every point from then on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from omnimerge.generate.memory import ByteStore, bits
from omnimerge.generate.response import GenerationStats

METHODS = ("get_image_features", "get_video_features", "get_audio_features")

_UNREAD = ("hidden_states", "attentions")
"""Of a method's result: all layers of the tower, which the language model never sees."""


class ReadRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which of some parameters any operator reads, while it is the active mode.

    Args:
        storages: the addresses of the parameters' storages.
    """

    def __init__(self, storages: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[int] = set()
        self._storages = storages

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        for argument in (*args, *given.values()):
            for part in argument if isinstance(argument, (list, tuple)) else (argument,):
                if isinstance(part, Tensor) and address(part) in self._storages:
                    self.seen.add(address(part))
        return func(*args, **given)


@dataclass
class _Call:
    """A method or a module's forward whose results are remembered."""

    name: str
    owner: nn.Module
    attribute: str
    checked: bool = False
    trusted: bool = True
    asked: int = 0


class FeatureMemo:
    """Remembers features of one model, batch by batch.

    Args:
        model: the model.
        store: where to keep them, in the host's memory.
        stats: where to count.
    """

    def __init__(self, model: nn.Module, store: ByteStore, stats: GenerationStats) -> None:
        self._model = model
        self._store = store
        self._stats = stats
        self._calls: list[_Call] = []
        self._changing: frozenset[str] = frozenset()
        self._storages: frozenset[int] = frozenset()
        self._weights = 0
        self._batch: Hashable = None
        self._active = False
        model.register_forward_hook(self._after_forward)

    @property
    def calls(self) -> dict[str, bool]:
        """Path of each call whose result is remembered -> whether it was found to be constant."""
        return {call.name: call.checked for call in self._calls if call.trusted}

    def changed(self, given: Collection[str], parameters: Mapping[str, Tensor]) -> None:
        """Note that the model's weights have changed.

        Args:
            given: names of all parameters that may differ from the point before.
            parameters: the model's ``state_dict()``.
        """
        self._weights += 1
        if self._changing == frozenset(given):
            return
        self.forget()
        self._changing = frozenset(given)
        self._storages = frozenset(address(parameters[name]) for name in given)
        for call in self._calls:
            delattr(call.owner, call.attribute)
        self._calls = [*_methods(self._model), *_modules(self._model, self._storages)]
        for call in self._calls:
            self._wrap(call)

    def forget(self) -> None:
        """Let go of all features."""
        self._store.drop_where(_is_feature)

    @contextmanager
    def batch(self, key: Hashable) -> Iterator[None]:
        """Remember and reuse inside the block, until the model's first forward pass is over.

        Args:
            key: what stands for the batch's inputs; None to remember nothing.

        Yields:
            Nothing.
        """
        self._batch, self._active = key, key is not None
        for call in self._calls:
            call.asked = 0
        try:
            yield
        finally:
            self._active = False

    def _after_forward(self, *_: Any) -> None:
        self._active = False  # later passes decode: they see no media

    def _wrap(self, call: _Call) -> None:
        original = getattr(call.owner, call.attribute)

        @functools.wraps(original)  # `generate` reads the signature
        def remembered(*args: Any, **kwargs: Any) -> Any:
            if not self._active or not call.trusted:
                return original(*args, **kwargs)
            self._active = False  # what is called inside is part of this
            try:
                return self._result(call, original, args, kwargs)
            finally:
                self._active = True

        setattr(call.owner, call.attribute, remembered)

    def _result(self, call: _Call, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        key = ("features", self._batch, call.name, call.asked)
        call.asked += 1
        inputs = _prints((args, kwargs))
        kept = self._store.get(key)
        if kept is None or inputs is None:
            return self._compute(call, original, args, kwargs, key, inputs)
        seen, outputs, weights = kept
        if seen != inputs:  # it depends on something that changes
            return self._refuse(call, original(*args, **kwargs))
        if not call.checked and weights != self._weights:
            fresh = original(*args, **kwargs)
            self._stats.features_computed += 1
            call.checked = _equal(_stored(fresh, call.attribute in METHODS), outputs)
            return fresh if call.checked else self._refuse(call, fresh)
        self._stats.features_reused += 1
        return _restored(outputs)

    def _compute(
        self,
        call: _Call,
        original: Callable[..., Any],
        args: Any,
        kwargs: Any,
        key: Hashable,
        inputs: Any,
    ) -> Any:
        with ReadRecorder(self._storages) as recorder:
            outputs = original(*args, **kwargs)
        self._stats.features_computed += 1
        stored = _stored(outputs, call.attribute in METHODS)
        if recorder.seen or inputs is None or stored is None:
            return self._refuse(call, outputs)
        self._store.put(key, (inputs, stored, self._weights))
        return outputs

    def _refuse(self, call: _Call, outputs: Any) -> Any:
        call.trusted = False
        self._store.drop_where(lambda key: _is_feature(key, call.name))
        return outputs


def address(tensor: Tensor) -> int:
    """Return where a tensor's storage lies, which views of it share.

    Args:
        tensor: any tensor.

    Returns:
        The address.
    """
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor subclass without storage
        return 0


def _is_feature(key: Any, call: str | None = None) -> bool:
    found = isinstance(key, tuple) and key[0] == "features"
    return found and (call is None or key[2] == call)


def _methods(model: nn.Module) -> Iterator[_Call]:
    for path, module in model.named_modules():
        for name in METHODS:
            if hasattr(type(module), name):
                yield _Call(f"{path}.{name}".lstrip("."), module, name)


def _modules(model: nn.Module, storages: Collection[int]) -> Iterator[_Call]:
    """The largest modules outside of what changes: towers, projectors, adapters."""
    changing = [
        path for path, parameter in model.named_parameters() if address(parameter) in storages
    ]
    stacks = {stack for path in changing if (stack := _stack(path))}
    decoders = {stack.rpartition(".")[0] for stack in stacks}
    words = set(map(id, words_of(model)))

    def walk(module: nn.Module, path: str) -> Iterator[_Call]:
        for name, child in module.named_children():
            place = f"{path}.{name}".lstrip(".")
            leaf = not any(True for _ in child.children())
            if place in stacks or id(child) in words or (leaf and path in decoders):
                continue  # a norm beside the stack sees what the stack made
            changes = any(p.startswith(f"{place}.") for p in changing)
            speaks = any(id(m) in words for m in child.modules())
            if changes or speaks or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                yield from walk(child, place)
            elif any(True for _ in child.parameters()):
                yield _Call(place, child, "forward")

    return walk(model, "")


def _stack(path: str) -> str:
    """``model.layers`` of ``model.layers.3.mlp.up_proj.weight``; empty if there is no number."""
    parts = path.split(".")
    return ".".join(next((parts[:i] for i, part in enumerate(parts) if part.isdigit()), []))


def words_of(model: Any) -> list[nn.Module]:
    """Return the modules that turn words into vectors and back.

    Args:
        model: a transformers model.

    Returns:
        The embedding and the head, as far as the model names them.
    """
    found = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, method)())
        except (AttributeError, NotImplementedError):
            continue
    return [module for module in found if module is not None]


def _prints(value: Any) -> Any:
    """Something that is equal for equal arguments; None where arguments cannot be compared."""
    if isinstance(value, Tensor):
        rows = bits(value).reshape(-1, value.shape[-1] if value.ndim else 1)
        sums = rows.sum(dim=1, dtype=torch.int64)
        order = torch.arange(1, len(sums) + 1, device=sums.device) * 0x9E3779B1
        return (tuple(value.shape), value.dtype, int(sums.sum()), int((sums * order).sum()))
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return (type(value).__name__, value)
    if isinstance(value, (list, tuple)):
        parts = [_prints(part) for part in value]
        return None if None in parts else (type(value).__name__, *parts)
    if isinstance(value, dict):
        parts = [_prints(part) for part in value.values()]
        return None if None in parts else ("dict", *zip(value, parts, strict=True))
    return None


def _stored(value: Any, of_method: bool) -> Any:
    """A copy in the host's memory that shares nothing; None if it holds what cannot be copied."""
    if isinstance(value, Tensor):
        return (Tensor, value.device, value.detach().to("cpu", copy=True))
    if value is None or isinstance(value, (bool, int, float, str)):
        return ("plain", value)
    if isinstance(value, dict):
        whole = not (of_method and value.get("pooler_output") is not None)
        names = [name for name in value if whole or name not in _UNREAD]
        parts = [_stored(value[name], of_method) for name in names]
        return None if None in parts else (type(value), names, parts)
    if type(value) in (list, tuple):
        parts = [_stored(part, of_method) for part in value]
        return None if None in parts else (type(value), parts)
    return None


def _restored(stored: Any) -> Any:
    """A new copy, since models write into what they are given."""
    kind, *rest = stored
    if kind is Tensor:
        device, tensor = rest
        return tensor.to(device, copy=True)
    if kind == "plain":
        return rest[0]
    if len(rest) == 2:
        return kind(**dict(zip(rest[0], map(_restored, rest[1]), strict=True)))
    return kind(_restored(part) for part in rest[0])


def _equal(a: Any, b: Any) -> bool:
    """Whether two stored values have the same bits."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same = isinstance(a, Tensor) and isinstance(b, Tensor)
        return same and a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
