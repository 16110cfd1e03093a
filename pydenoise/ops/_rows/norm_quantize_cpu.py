"""CPU rows of ``norm_quantize``."""

ROWS = ()
