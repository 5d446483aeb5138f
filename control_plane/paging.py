"""Lists that are read page by page: where one page ends, and the next begins."""

from __future__ import annotations

import base64
from typing import Final

from parallax.control_plane.engines.engine import check_key
from parallax.security.errors import InvalidRequest

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1_000  # of some 500 bytes each; a message may have 1 MiB


def size_of(stated: int) -> int:
    """How many a page has for which *stated* were asked; 0 stands for no number."""
    return min(stated or DEFAULT_PAGE, MAX_PAGE)


def token_of(key: str) -> str:
    """What asks for the page behind *key*; empty if that is."""
    return base64.urlsafe_b64encode(key.encode()).decode()


def position(page_token: str) -> str:
    """
    Behind which record the page begins; "" at the first.

    Raises:
        InvalidRequest: It is not what `token_of` gives.
    """
    if not page_token:
        return ""
    try:
        return check_key(base64.b64decode(page_token, b"-_", validate=True).decode())
    except ValueError:
        raise InvalidRequest(
            "the page token is not one that a page has given; leave it out for the first page"
        ) from None
