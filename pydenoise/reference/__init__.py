"""Every op in plain, readable torch: exact in float64, the oracle of the tests and the fallback of the registry."""
