"""Ray's control store (GCS), without which no actor can be started or ended, while calls to living actors go on.

Ray ends every process of a cluster, this one too, when its control store has been away for 60 seconds
(`RAY_gcs_rpc_server_reconnect_timeout_s`). The campaign ends before, with a checkpoint.
"""

import asyncio
import time

import ray

from actors.errors import CampaignError
from cluster.fleet.ray_cluster import probe

PATIENCE_SECONDS = 20.0
"""A control store that is started again within this time costs nothing."""
PAUSE_SECONDS, ANSWER_SECONDS = 2.0, 3.0


async def control_store_lost() -> None:
    """Returns never. CampaignError: the control store has not answered for PATIENCE_SECONDS."""
    address, heard = ray.get_runtime_context().gcs_address, time.monotonic()
    while True:
        await asyncio.sleep(PAUSE_SECONDS)
        try:
            await asyncio.to_thread(probe, address, ANSWER_SECONDS)
            heard = time.monotonic()
        except OSError as error:
            if time.monotonic() - heard > PATIENCE_SECONDS:
                raise CampaignError(
                    f"Ray's control store at {address} has not answered for {PATIENCE_SECONDS:g} s ({error}): the cluster "
                    "is lost; the same command goes on from the last checkpoint in another one"
                ) from error
