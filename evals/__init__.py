"""How much was lost, and how fast what is left serves: drift, load, the report."""
