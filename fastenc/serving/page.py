"""The page at `/`: one file, whose own script and style are all that it may run and load."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources


def load_page() -> tuple[str, str]:
    """The page, and the Content-Security-Policy that fits it."""
    page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    script, style = (
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for name in ("script", "style")
        for part in re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
    )
    policy = (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
