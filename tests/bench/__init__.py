"""The benchmark: our proxy and its peers in one run and one topology. See README.md."""
