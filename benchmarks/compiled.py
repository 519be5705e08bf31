"""torch.compile as a contestant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

COMPILED = "torch.compile"


def compiled(eager: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What torch's compiler makes of `eager` for each shape; compiled at the first call."""
    return torch.compile(eager, dynamic=False)
