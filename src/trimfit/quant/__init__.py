"""From weights to few levels, without data. Tensors only: no file here knows a model."""

from trimfit.quant.grid import Grid as Grid
from trimfit.quant.grid import Levels as Levels
from trimfit.quant.grid import Quantized as Quantized
from trimfit.quant.grid import place_levels as place_levels
