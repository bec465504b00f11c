"""The attention plug: where methods of inference time reach into any Hugging Face decoder.

``plugged(model, handler)`` attaches three things and takes them away again: an attention function with its mask
function, a pre-hook on each attention module, and a cache whose layers keep the true position of every entry. A
``Handler`` says which pairs are computed and what becomes of the cache; the plug computes and counts. ``reach``
refuses models whose attention it cannot get at.
"""

from sparsebench.models.plug.attach import plugged, positions_of, reach
from sparsebench.models.plug.cache import PositionCache, PositionLayer
from sparsebench.models.plug.call import Allowed, Call, Handler, Work, check_rotary, rotates

__all__ = ["Allowed", "Call", "Handler", "PositionCache", "PositionLayer", "Work", "check_rotary", "plugged",
           "positions_of", "reach", "rotates"]  # fmt: skip
