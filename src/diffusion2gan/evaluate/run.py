"""`diffusion2gan evaluate`: measures a system's images by a protocol.

The keys of `metrics.json` are listed in docs/reference/files.md.
"""

from __future__ import annotations

from typing import Any

from diffusion2gan.evaluate.coco import evaluate_coco
from diffusion2gan.evaluate.own import evaluate_own
from diffusion2gan.evaluate.pocket import evaluate_pocket
from diffusion2gan.evaluate.protocols import OWN, POCKET, get_protocol
from diffusion2gan.evaluate.settings import EvaluateSettings, check_options, default_protocol


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """All metrics of a system by the protocol of `settings`: the content of metrics.json.

    Images are kept in `settings.cache` and reused. Under torchrun the ranks generate the images
    together; rank 0 measures them, and the others return an empty dict. Raises UserError if the
    protocol is unknown, an option is not used by it, or the system does not fit it.
    """
    protocol = get_protocol(settings.protocol or default_protocol(settings))
    check_options(settings, protocol)

    if protocol == POCKET:
        return evaluate_pocket(settings)
    if protocol == OWN:
        return evaluate_own(settings)
    return evaluate_coco(settings, protocol)
