"""Weight transports: both ends of each in one plug-in. No engine is imported here."""
