"""Everything that Dagster runs: assets, checks, jobs, schedules and sensors, and its instance."""
