"""Model surgery behind ``pydenoise.accelerate``: recognise layers, find chains, rewrite, measure, report."""
