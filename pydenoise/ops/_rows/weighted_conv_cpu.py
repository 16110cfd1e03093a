"""CPU rows of weighted convolution."""

ROWS = ()
