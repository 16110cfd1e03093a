"""CPU rows of ``quantize``."""

ROWS = ()
