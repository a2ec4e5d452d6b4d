"""Forward hooks that are removed when their context ends, whatever happens in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

ModuleHook = tuple[nn.Module, Callable[..., Any]]


@contextmanager
def forward_hooks(
    after: Iterable[ModuleHook] = (),
    *,
    before: Iterable[ModuleHook] = (),
    with_kwargs: bool = False,
    prepend: bool = False,
) -> Iterator[None]:
    """Hook the forward passes of modules for the length of the block.

    Args:
        after: pairs of a module and a hook that runs after its forward: ``hook(module, args, output)``.
        before: pairs of a module and a hook that runs before its forward: ``hook(module, args)``.
        with_kwargs: pass keyword arguments too: ``hook(module, args, kwargs, output)`` and ``hook(module, args,
            kwargs)``.
        prepend: run these hooks before the ones that the modules have already.

    >>> from torch import nn, ones
    >>> layer, shapes = nn.Linear(3, 5), []
    >>> with forward_hooks([(layer, lambda module, args, output: shapes.append((args[0].shape, output.shape)))]):
    ...     _ = layer(ones(2, 3))
    >>> _ = layer(ones(7, 3))
    >>> shapes
    [(torch.Size([2, 3]), torch.Size([2, 5]))]
    """
    with ExitStack() as stack:
        for module, hook in before:
            handle = module.register_forward_pre_hook(hook, with_kwargs=with_kwargs, prepend=prepend)
            stack.callback(handle.remove)
        for module, hook in after:
            handle = module.register_forward_hook(hook, with_kwargs=with_kwargs, prepend=prepend)
            stack.callback(handle.remove)
        yield
