"""The command line: ``pydenoise denoise | sample | gallery | demo | bench | info | weights``; a module for each."""
