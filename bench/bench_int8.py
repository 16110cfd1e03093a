"""Single int8 layers of diffusion U-Nets, one provider at a time."""

SUITE = "int8-layers"


def test_int8(time_contender, case, provider):
    time_contender(case, provider)
