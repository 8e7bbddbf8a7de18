"""The walk over the blocks of a model: observe, fit, install, pass on."""

from tensormix.compression.home import Home
from tensormix.compression.streams import Calibration, Stream, streams_of
from tensormix.compression.walk import Progress, Walk, compress, named

__all__ = ["Calibration", "Home", "Progress", "Stream", "Walk", "compress", "named", "streams_of"]
