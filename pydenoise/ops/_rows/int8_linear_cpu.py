"""CPU rows of ``int8_linear``."""

ROWS = ()
