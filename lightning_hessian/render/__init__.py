"""Pictures of records, by numpy and matplotlib only."""
