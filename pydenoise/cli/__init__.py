"""The command line: ``pydenoise info | denoise | demo | bench | weights``; one module per command."""
