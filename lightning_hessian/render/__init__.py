"""Pictures of records: numpy and matplotlib only, torch is not known here."""
