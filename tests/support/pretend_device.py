"""A device that is none: tensors of "meta" that are computed here, and mix with the CPU's nowhere.

Any operation on tensors of both sides raises, as a real accelerator's would; so does NumPy.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from omnimerge.engine.lane import Copies, Lane

NAME = "meta"
_THERE = torch.device(NAME)
_CROSSING = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class _There(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_THERE,
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"There({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """While it is active, the device is there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    there = [each for each in given if isinstance(each, _There)]
    asked = kwargs.get("device")
    if func not in _CROSSING and there:
        mixed = [each for each in given if not isinstance(each, _There) and each.ndim]
        if mixed:
            raise RuntimeError(f"{func}: tensors of {NAME} and of cpu")
    if asked is not None:
        kwargs = {**kwargs, "device": "cpu", "pin_memory": False}
        if func is torch.ops.aten._to_copy.default:
            kwargs["non_blocking"] = False
        to = torch.device(asked).type == _THERE.type
    elif func is torch.ops.aten.copy_.default:
        to = isinstance(args[0], _There)
    else:
        to = bool(there)
    plain = tree_map(lambda each: each.held if isinstance(each, _There) else each, (args, kwargs))
    found = func(*plain[0], **plain[1])
    if not to:
        return found
    wrapped = tree_map(lambda each: _There(each) if isinstance(each, torch.Tensor) else each, found)
    if there:
        return return_and_correct_aliasing(func, args, kwargs, wrapped)
    return wrapped


class LateCopies(Copies):
    """Copies to the device that are done as late as a real one's may be, and never later.

    A host buffer that is read before its copy arrived holds rubbish; one that is written to before
    its copy has left is noticed.
    """

    def __init__(self):
        self.buffers, self.most, self._under_way = [], 0, {}

    def buffer(self, nbytes):
        self.buffers.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def stream(self):
        return Pretend()

    def copy(self, into, source):
        for sent, still in self._under_way.values():
            assert torch.equal(sent, still), "a buffer was written to while it was on its way"
        mark, on_the_host = object(), not isinstance(into, _There)
        if on_the_host:
            later = source.cpu()
            into.fill_(0xA5)
            self._under_way[mark] = into.clone(), into
        else:  # on the stream, before what is computed next
            into.copy_(source)
            self._under_way[mark] = source.clone(), source
        self.most = max(self.most, len(self._under_way))

        def wait():
            if self._under_way.pop(mark, None) and on_the_host:
                into.copy_(later)

        return wait


def lanes(made=None):
    """What makes lanes to the device, for `DeviceExecutor`; each is added to a list."""

    def make(device, piece):
        copies = LateCopies()
        if made is not None:
            made.append(copies)
        return Lane(device, piece, copies)

    return make
