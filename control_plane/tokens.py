"""The enrollment tokens that there are, without their secrets."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from parallax.control_plane.audit import MAX_OWN_WRITES, AuditLog, Deed
from parallax.control_plane.engines.engine import ABSENT, MAX_PAGE, Engine, Write
from parallax.security.errors import EnrollmentError
from parallax.security.identity import Kind, control_plane
from parallax.security.tokens import REFUSED, Admission, Grant, Token, check_ttl

TOKENS: Final = "tokens/"
KEPT: Final = timedelta(days=1)  # after its end, so that whoever made it can see what became of it


class Tokens:
    """
    Keeps tokens in an engine: their digests, what they grant, and to whom they were given.

    Args:
        clock: Aware UTC.
    """

    def __init__(self, engine: Engine, audit: AuditLog, clock: Callable[[], datetime]) -> None:
        self._engine = engine
        self._audit = audit
        self._clock = clock
        self._nobodys = Token.generate().digest

    async def create(self, grant: Grant, ttl: timedelta, by: str) -> tuple[Token, Admission]:
        """
        A new token, which nobody sees again.

        Raises:
            InvalidRequest: It would last too long, or not at all.
            StorageFailed: It is not known to be kept.
        """
        token, now = Token.generate(), self._clock()
        admission = Admission(token.id, token.digest, grant, by, now, now + check_ttl(ttl))
        deed = Deed("token/created", by, f"token {token.id}", detail=_detail(admission))
        await self._audit.commit(deed, [Write(_key(token.id), encode(admission), ABSENT)])
        return token, admission

    async def page(self, after: str = "", limit: int = MAX_PAGE) -> tuple[list[Admission], str]:
        """
        At most *limit* tokens, by id, and behind what to go on, which is empty at the end.

        Args:
            after: What the page before gave.
        """
        records = await self._engine.scan(TOKENS, after, min(limit, MAX_PAGE))
        more = records[-1].key if len(records) == min(limit, MAX_PAGE) else ""
        return [decode(record.value or b"") for record in records], more

    async def revoke(self, token_id: str, by: str) -> bool:
        """
        Take a token out; False if there is none with that id.

        Raises:
            StorageFailed: It is not known to be gone.
        """
        found = await self._engine.get(_key(token_id))
        if found is None:
            return False
        await self._audit.commit(
            Deed("token/revoked", by, f"token {token_id}"), [Write(found.key, None, found.revision)]
        )
        return True

    async def admission(self, token: Token, now: datetime) -> tuple[Admission, int]:
        """
        What is kept of *token*, which may be redeemed still, and the revision of that.

        Raises:
            EnrollmentError: There is none, or it has ended; the work and the text are the same.
        """
        found = await self._engine.get(_key(token.id))
        if found is None:
            nobody = Admission(token.id, self._nobodys, _NOTHING, "", now, now)
            nobody.check(token, now)
            raise EnrollmentError(REFUSED)
        admission = decode(found.value or b"")
        admission.check(token, now)
        return admission, found.revision

    async def sweep(self) -> int:
        """Drop the tokens that ended longer than `KEPT` ago; how many they were."""
        before, after, dropped = self._clock() - KEPT, "", 0
        while True:
            page, after = await self.page(after, MAX_OWN_WRITES)
            ended = [each.id for each in page if each.expires_at < before]
            if ended:
                deed = Deed("token/pruned", str(control_plane()), detail={"tokens": " ".join(ended)})
                await self._audit.commit(deed, [Write(_key(each), None) for each in ended])
                dropped += len(ended)
            if not after:
                return dropped


def write(admission: Admission, expected: int) -> Write:
    """What keeps *admission* in place of what had the revision *expected*."""
    return Write(_key(admission.id), encode(admission), expected)


def encode(admission: Admission) -> bytes:
    """As it is stored."""
    stored = {name: getattr(admission, name) for name in ("id", "digest", "created_by")}
    times = {name: getattr(admission, name).isoformat() for name in ("created_at", "expires_at")}
    grant = {name: getattr(admission.grant, name) for name in ("trust_domain", "kind", "names", "uses")}
    grant["labels"] = dict(admission.grant.labels)
    given = {name: dict(getattr(admission, name)) for name in ("redeemed", "allotted")}
    return json.dumps({**stored, **times, **given, "grant": grant}).encode()


def decode(stored: bytes) -> Admission:
    """What `encode` gave."""
    read = json.loads(stored)
    grant = read["grant"]
    return Admission(
        id=read["id"],
        digest=read["digest"],
        grant=Grant(
            grant["trust_domain"], Kind(grant["kind"]), grant["names"], grant["labels"], grant["uses"]
        ),
        created_by=read["created_by"],
        created_at=datetime.fromisoformat(read["created_at"]),
        expires_at=datetime.fromisoformat(read["expires_at"]),
        redeemed=read["redeemed"],
        allotted=read.get("allotted", {}),
    )


def _detail(admission: Admission) -> dict[str, str]:
    grant = admission.grant
    return {
        "grants": f"{grant.kind}/{grant.names}",
        "uses": str(grant.uses),
        "labels": " ".join(f"{key}={value}" for key, value in grant.labels.items()),
        "expires_at": admission.expires_at.isoformat(),
    }


def _key(token_id: str) -> str:
    return f"{TOKENS}{token_id}"


_NOTHING: Final = Grant("parallax.local", Kind.AGENT, "nobody")
