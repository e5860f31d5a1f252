"""A saved model behind HTTP: see docs/serving.md. `fastenc serve` is its command."""

from .app import make_app
from .server import listen, make_server
from .settings import Settings

__all__ = ["Settings", "listen", "make_app", "make_server"]
