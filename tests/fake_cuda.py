"""CUDA graphs played on a CPU, so that what is recorded can be tested without a GPU.

Like a GPU it computes nothing while it records, refuses whatever would have to wait for the GPU, and replays on the
memory of the recorded tensors. It knows nothing of streams: that needs a GPU.
"""

import contextlib
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2}


def tensors_in(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class FakeCUDAGraph(TorchDispatchMode):
    """torch.cuda.CUDAGraph: as a context, the operations inside are recorded; replay() repeats them."""

    replays = 0

    def __enter__(self):
        self.operations, self.before, self.own = [], {}, set()
        self.random_state = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        masks = [x for x in tensors_in((args[1:2], kwargs)) if x.dtype == torch.bool]
        if func._overloadpacket in WAITING or (func._overloadpacket in (aten.index, aten.index_put) and masks):
            raise RuntimeError(f"{func} waits for the GPU: operation not permitted when stream is capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            for x in tensors_in(value) if argument.alias_info and argument.alias_info.is_write else ():
                if (memory := x.untyped_storage().data_ptr()) not in self.own | self.before.keys():
                    self.before[memory] = x, x.clone()
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))  # which keeps its memory from being used again
        if not func.is_view:
            written = {x.untyped_storage().data_ptr() for x in tensors_in((args, kwargs))}
            self.own |= {x.untyped_storage().data_ptr() for x in tensors_in(result)} - written
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.random_state)
        with torch.no_grad():
            for x, value in self.before.values():
                x.copy_(value)

    @torch.no_grad()
    def replay(self):
        type(self).replays += 1
        for func, args, kwargs, result in self.operations:
            for ours, new in zip(tensors_in(result), tensors_in(func(*args, **kwargs)), strict=True):
                if ours.data_ptr() != new.data_ptr():
                    ours.copy_(new)


class FakeStream:
    def wait_stream(self, other):
        assert isinstance(other, FakeStream)


def install(monkeypatch) -> None:
    """Put it in the place of torch.cuda's, and let Adam be recorded on a CPU."""
    monkeypatch.setattr(FakeCUDAGraph, "replays", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeCUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(sys.modules[torch.optim.Adam.__module__], "_get_capturable_supported_devices", lambda: ["cpu"])
