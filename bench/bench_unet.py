"""Whole U-Nets in float and int8, one provider at a time."""

SUITE = "unet"


def test_unet(time_contender, case, provider):
    time_contender(case, provider)
