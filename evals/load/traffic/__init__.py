"""Traffic: profiles of it (``*.yaml`` here), the schedule that follows from one, and the client that sends it."""
