"""Weighted convolution, one provider at a time."""

SUITE = "weighted_conv"


def test_weighted_conv(time_contender, case, provider):
    time_contender(case, provider)
