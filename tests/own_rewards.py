"""A reward of the user's own, in a module that imports in a moment."""

import asyncio
from typing import Any


async def graded(response: str, reference: str | None, record: dict[str, Any], prompt: str) -> dict[str, float]:
    """A verifier that reads the record and the prompt, waits, and returns named parts."""
    await asyncio.sleep(0)
    assert record["prompt"] in prompt and record["answer"] == reference
    short = float(len(response) < 4)
    return {"reward": 0.5 * short + 0.5 * (response == reference), "short": short}
