"""The walk over the blocks of a model: observe, fit, install, pass on."""

from tensormix.walk.walk import Calibration, Home, Progress, Stream, Walk, compress, named, streams_of

__all__ = ["Calibration", "Home", "Progress", "Stream", "Walk", "compress", "named", "streams_of"]
