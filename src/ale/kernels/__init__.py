"""Custom kernels: torch and triton only, no import of the rest of `ale`."""
