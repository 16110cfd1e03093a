"""Backend rows, one file per op and compiled backend; imported by the op's own file, which registers them."""
