"""Where workers run: as processes of this machine, or elsewhere on engines that exist."""
