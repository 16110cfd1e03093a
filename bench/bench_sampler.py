"""Steps of samplers, their noise and whole runs, one provider at a time."""

SUITE = "sampler"


def test_sampler(time_contender, case, provider):
    time_contender(case, provider)
