"""MetaSchedule databases, one folder per tuned device, with their provenance."""
