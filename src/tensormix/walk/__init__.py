"""The walk over the blocks of a model: observe, fit, install, pass on."""

from tensormix.walk.home import Home
from tensormix.walk.streams import Calibration, Stream, streams_of
from tensormix.walk.walk import Progress, Walk, compress, named

__all__ = ["Calibration", "Home", "Progress", "Stream", "Walk", "compress", "named", "streams_of"]
