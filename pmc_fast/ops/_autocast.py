"""What the ops compute is not torch.autocast's to round."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def outside_autocast(function: Callable) -> Callable:
    """The function, of arguments by position that hold a tensor, with autocast off.

    It is on within custom operators and autograd.Functions, too, where products would round what they are given to 16 bits.
    """

    @wraps(function)
    def call(*args):
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return call
