"""Where workers run: processes or containers of this machine, or jobs of a Ray or Kubernetes cluster."""
