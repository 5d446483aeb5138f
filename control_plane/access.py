"""Who may call what: the policy in force, the labels that it goes by, and who is told of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from parallax.control_plane.policy_feed import PolicyFeed
from parallax.runtime.authorization import Authorization
from parallax.runtime.policy_file import PolicyFile

if TYPE_CHECKING:
    from parallax.control_plane.grants import Grants, Regrant
    from parallax.runtime.policy import Policy
    from parallax.runtime.settings import Settings
    from parallax.security.identity import Identity


class Access:
    """
    Decides, and has whatever is open decided anew once it would decide otherwise.

    Args:
        reconsider: Looks again at what is open or waits.

    Attributes:
        file: The policy as it is written.
        feed: Tells agents.

    Raises:
        ConfigError: What the file holds now is no policy.
    """

    def __init__(
        self, settings: Settings, trust_domain: str, grants: Grants, reconsider: Callable[[], None]
    ) -> None:
        self.file = PolicyFile(settings.policy_file, self.adopt, settings.certs_poll)
        self.authorization = Authorization(self.file.policy, trust_domain, labels_of=grants.labels_of)
        self.feed = PolicyFeed(self.authorization, grants)
        self._reconsider = reconsider
        grants.on_change = self._regranted

    def names_administrator(self, identity: Identity) -> bool:
        """Whether the policy in force lets *identity*, by that very name, administer."""
        return self.authorization.policy.names_administrator(identity)

    def adopt(self, policy: Policy) -> None:
        """Put *policy* in force."""
        self.authorization.replace(policy)
        self._reconsider()
        self.feed.wake()

    def _regranted(self, change: Regrant) -> None:
        self.feed.note(change)
        if not change.labels.isdisjoint(self.authorization.policy.labels):  # else nothing is decided by them
            self.authorization.forget()
            self._reconsider()
