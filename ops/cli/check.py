"""``ratchet check``: whether a model server answers as it should, from where this command runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from core.errors import RatchetError
from ops.cli import context as ctx
from ops.cli.model_server import ServerOption, operator_client

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TEXTS = ("a photo of a cat", "a photo of a cat", "a red sports car")
TOLERANCE = 1e-3


def check(
    context: typer.Context,
    wait: Annotated[float, typer.Option(min=0, max=3600, help="Seconds to wait until the server is ready.")] = 0.0,
    server: ServerOption = None,
) -> None:
    """Ask the model server for embeddings, and check them; the last step of an installation. Exit status 1: not well.

    Examples:  ratchet check    |    ratchet check --wait 300 --server http://127.0.0.1:8000
    """
    import numpy as np

    with operator_client(ctx.of(context).calling(server)) as client:
        if wait:
            client.wait_ready(wait, ["clip"])
        vectors, release = np.asarray(client.embed(TEXTS)), client.live()
    fault = fault_of(vectors)
    if fault:
        raise RatchetError(f"{client.url} answers with wrong embeddings: {fault}.", "Look at the logs of its encoders.")
    typer.echo(f"{client.url} embeds texts as release {release}: {vectors.shape[1]} dimensions")


def fault_of(vectors: npt.NDArray[np.float32]) -> str:
    """What is wrong with the embeddings [3, dim] of :data:`TEXTS`; empty if nothing is."""
    import numpy as np

    if vectors.ndim != 2 or len(vectors) != len(TEXTS):
        return f"{len(TEXTS)} texts were sent, an array of shape {vectors.shape} came back"
    if not np.isfinite(vectors).all():
        return "not all numbers are finite"
    if np.abs(np.linalg.norm(vectors, axis=1) - 1).max() > TOLERANCE:
        return "not all have the length 1"
    same, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    if same < 1 - TOLERANCE:
        return f"those of the same text differ (cosine {same:.4f})"
    if other > 1 - TOLERANCE:
        return f"those of different texts are the same (cosine {other:.4f})"
    return ""
