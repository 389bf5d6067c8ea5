"""Operation of released models and of this home: rescan, retention, tiering, notifications, metrics, doctor."""
