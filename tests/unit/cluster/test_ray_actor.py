"""The messages about a lost actor."""

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from cluster.fleet.ray_actor import cause_of

BROKEN = "The actor is temporarily unavailable: RpcError: RPC error: {} rpc_code: 14"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ActorUnavailableError(BROKEN.format("Socket closed"), b"\0" * 16),
            "it cannot be reached any more, as when its node is gone (Socket closed)",
        ),
        (
            ActorUnavailableError("it is restarting", None),
            "it cannot be reached any more, as when its node is gone (The actor None is unavailable: it is restarting. "
            "The task may or may not have been executed on the actor.)",
        ),
        (ActorDiedError(), "The actor died unexpectedly before finishing this task."),
        (
            RayActorError(
                "0", "The actor died.\nThe actor is dead because its node has died.\nip: 10.0.0.1", False, False
            ),
            "The actor is dead because its node has died.",
        ),
    ],
)
def test_why_an_actor_was_lost_is_one_line(error: RayActorError, told: str) -> None:
    assert cause_of(error) == told
