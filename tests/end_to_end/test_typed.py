"""A handler annotated with types is called with these or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from pydantic import BaseModel

from parallax.sdk import SecureAgent
from parallax.sdk.payload import encode, reader
from parallax.security.errors import TaskFailed

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet


class Review(BaseModel):
    text: str
    stars: int


@dataclass
class Verdict:
    mood: str
    stars: int | None


class Critic(SecureAgent):
    async def analyze(self, task: str, data: list[Review]) -> tuple[Verdict, float]:
        assert all(type(review) is Review for review in data)
        if task == "lie":
            return Verdict("bad", "three"), 1.0  # type: ignore[arg-type]
        return Verdict("good", max(review.stars for review in data)), 0.5


class OnThreads(SecureAgent):
    def analyze(self, task: str, data: list[Review]) -> tuple[Verdict, float]:
        assert all(type(review) is Review for review in data)
        if task == "lie":
            return Verdict("bad", "three"), 1.0  # type: ignore[arg-type]
        return Verdict("good", max(review.stars for review in data)), 0.5


@pytest.mark.parametrize("agent_class", [Critic, OnThreads])
async def test_models_go_there_and_dataclasses_come_back(
    fleet: Fleet, agent_class: type[SecureAgent]
) -> None:
    async with fleet.agent(agent_class), fleet.client() as client:
        result = await client.analyze("agent-1", "rate", [Review(text="fine", stars=4)])
        assert result.value == {"mood": "good", "stars": 4}
        assert reader(Verdict)(encode(result.value)) == Verdict("good", 4)
        for data, reason in [
            ([{"text": "fine", "stars": "4"}], r"\$\[0\]\.stars: input should be a valid integer"),
            ([{"text": "fine"}], r"\$\[0\]\.stars: field required"),
            (b"\x00fine", r"JSON is expected, for list\[Review\]"),
        ]:
            with pytest.raises(TaskFailed, match=reason) as failed:
                await client.analyze("agent-1", "rate", data)
            assert failed.value.code == "INVALID_ARGUMENT"
            assert "fine" not in str(failed.value)
        with pytest.raises(TaskFailed, match="does not fit Verdict: stars: int") as failed:
            await client.analyze("agent-1", "lie", [])
        assert failed.value.code == "INVALID_RESULT"
        assert "three" not in str(failed.value)
