"""What keeps releases in order: rescan, retention, tiering, notifications, metrics, doctor."""
