"""CEMA, the complex exponential moving average of MEGALODON."""

from pallas_kernels.cema.api import cema
from pallas_kernels.cema.bidirectional import bidirectional_cema
from pallas_kernels.cema.types import CemaOutput, CemaParams

__all__ = ["CemaOutput", "CemaParams", "bidirectional_cema", "cema"]
