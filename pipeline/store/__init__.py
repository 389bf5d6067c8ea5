"""The store of content-addressed artifacts, and the index of each asset's last artifact."""
