"""Forward hooks, and forwards in the places of others, that are removed when their context ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]
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


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], replace: Callable[[int, Forward], Forward]) -> Iterator[None]:
    """Run ``replace(index, forward)`` instead of each module's ``forward`` for the length of the block."""
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = replace(index, module.forward)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            module.__dict__.pop("forward", None)  # the class's own shows again
            if forward is not None:
                module.forward = forward
