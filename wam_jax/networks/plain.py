"""Programs as the equations have them, without what makes them fast: for counting their operations."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """Programs that are traced in this context take each product once and as it stands, whatever the backend."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    """Whether a program that is traced now is to be plain."""
    return _plain.get()


def takes(backends: tuple[str, ...]) -> bool:
    """Whether a program that is traced now takes a form that is for these backends."""
    return jax.default_backend() in backends and not _plain.get()
